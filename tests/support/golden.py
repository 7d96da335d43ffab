"""Weights that need no random numbers, so that the golden bytes hold for every version of torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

# A Mixtral of one layer and two experts, with only those entries of a config that matter.
CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 8,
    "hidden_size": 72,  # a ragged second group
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def weight(name: str, *shape: int) -> torch.Tensor:
    """Sixteenths between -2 and 2 (exact in bf16 and fp16), another sequence for each name."""
    start = sum(name.encode())
    numbers = (torch.arange(start, start + torch.Size(shape).numel()) * 37 % 65 - 32) / 16
    return numbers.view(shape).bfloat16()


def write_checkpoint(folder: Path) -> Path:
    hidden, width, layer = 72, 16, "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (8, hidden),
        "lm_head.weight": (8, hidden),
        "model.norm.weight": (hidden,),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        f"{layer}self_attn.q_proj.weight": (72, hidden),
        f"{layer}self_attn.k_proj.weight": (36, hidden),
        f"{layer}self_attn.v_proj.weight": (36, hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, 72),
        f"{layer}block_sparse_moe.gate.weight": (2, hidden),
    }
    for expert in range(2):
        prefix = f"{layer}block_sparse_moe.experts.{expert}."
        shapes |= {
            f"{prefix}w1.weight": (width, hidden),
            f"{prefix}w2.weight": (hidden, width),
            f"{prefix}w3.weight": (width, hidden),
        }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: weight(name, *shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder
