"""Writes a Hugging Face checkpoint as a GGUF file for llama.cpp: matrices Q4_0, routers and norms F32.

    python -m benchmarks.gguf_export CHECKPOINT FILE.gguf

Tensor names and quantization are the `gguf` package's; peak memory is one layer's stack of experts. The vocabulary is a list of
placeholders, because every workload uses token ids.

llama.cpp's qwen2moe graph does not normalize the routing weights, whatever `norm_topk_prob` is. A checkpoint that needs this (the
upcycled one does) is written as ernie4_5-moe, whose graph normalizes them. It computes the same function if biases are zero and the
shared expert's gate is always one half (which is folded into its down projection).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from rich.progress import track
from transformers import AutoConfig

from fate_moe.checkpoints.source import Checkpoint
from fate_moe.errors import FateError, UnsupportedModelError
from fate_moe.units import format_bytes

ARCHITECTURES = {
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
}


# Tensors that ernie4_5-moe does not have; they must be zero.
FOLDED = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "shared_expert_gate.weight")


def export(folder: Path, file: Path) -> Path:
    """Write ``file``, complete or not at all. Raises UnsupportedModelError for a family that is not in ARCHITECTURES."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(f"{config.model_type} cannot be written as GGUF; supported are {', '.join(ARCHITECTURES)}")
    arch, checkpoint = ARCHITECTURES[config.model_type], Checkpoint(folder)
    normalized = config.model_type == "qwen2_moe" and config.norm_topk_prob
    if normalized:
        arch = gguf.MODEL_ARCH.ERNIE4_5_MOE
        check_foldable(checkpoint, config)
    pieces = stacks(checkpoint, arch, config.num_hidden_layers)
    folded = partial(fold, config=config) if normalized else lambda gguf_name, weight: weight
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[arch])
    describe(writer, config)
    if normalized:
        describe_normalized(writer, config)
    for gguf_name, names in pieces.items():
        shape, kind = form(checkpoint, gguf_name, names)
        bytes_shape = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(gguf_name, bytes_shape, np.dtype(np.uint8), int(np.prod(bytes_shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the GIL
        for gguf_name, names in track(pieces.items(), description="GGUF", disable=not sys.stderr.isatty()):
            kind = form(checkpoint, gguf_name, names)[1]
            weights = (folded(gguf_name, checkpoint.read(name).float()).numpy() for name in names)
            quantized = pool.map(partial(gguf.quants.quantize, qtype=kind), weights)
            writer.write_tensor_data(np.concatenate([part.reshape(-1).view(np.uint8) for part in quantized]))
    writer.close()
    unfinished.replace(file)
    return file


def stacks(checkpoint: Checkpoint, arch: gguf.MODEL_ARCH, num_layers: int) -> dict[str, list[str]]:
    """GGUF name -> the checkpoint's names of it: one, or those of all experts in order, since llama.cpp needs them as one stack."""
    known = gguf.get_tensor_name_map(arch, num_layers)
    by_expert: dict[str, dict[int, str]] = defaultdict(dict)
    for name in checkpoint.names:
        if arch is gguf.MODEL_ARCH.ERNIE4_5_MOE and name.endswith(FOLDED):
            continue
        expert = re.search(r"\.experts\.(\d+)\.", name)
        gguf_name = known.get_name(name.replace(expert[0], ".experts.") if expert else name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UnsupportedModelError(f"{checkpoint.folder}: no GGUF name is known for {name}")
        by_expert[gguf_name][int(expert[1]) if expert else 0] = name
    by_expert.setdefault("output.weight", by_expert["token_embd.weight"])  # tied: llama.cpp's graphs of these families need both
    return {gguf_name: [names[expert] for expert in sorted(names)] for gguf_name, names in by_expert.items()}


def form(checkpoint: Checkpoint, gguf_name: str, names: list[str]) -> tuple[tuple[int, ...], gguf.GGMLQuantizationType]:
    """The stacked tensor's shape and type: matrices are Q4_0, except routers and rows that are not a multiple of 32."""
    shape = checkpoint.shape(names[0])
    if len(shape) == 1 or shape[0] == 1:  # norms, biases, the shared expert's gate
        return shape[-1:], gguf.GGMLQuantizationType.F32
    kinds = gguf.GGMLQuantizationType
    kind = kinds.F32 if "ffn_gate_inp" in gguf_name else kinds.F16 if shape[-1] % 32 else kinds.Q4_0
    return ((len(names), *shape) if len(names) > 1 else shape), kind


def check_foldable(checkpoint: Checkpoint, config: Any) -> None:
    """Raise UnsupportedModelError unless ernie4_5-moe's graph computes this qwen2_moe checkpoint, which normalizes routing."""
    for name in checkpoint.names:
        if name.endswith(FOLDED) and checkpoint.read(name).any():
            raise UnsupportedModelError(f"{checkpoint.folder}: llama.cpp cannot normalize routing weights where {name} is not zero")


def fold(gguf_name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Adapt ``weight`` to ernie4_5-moe: its rotary embedding pairs neighbouring rows, not halves; its shared expert has no gate."""
    if gguf_name.endswith(("attn_q.weight", "attn_k.weight")):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return weight.view(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight / 2 if gguf_name.endswith("ffn_down_shexp.weight") else weight


def describe_normalized(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(0)
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def describe(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    writer.add_name("benchmark")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if head_size := getattr(config, "head_dim", None):
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if width := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(width)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{token}>" for token in range(config.vocab_size)])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * config.vocab_size)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    try:
        print(f"{export(arguments.checkpoint, arguments.file)}: {format_bytes(arguments.file.stat().st_size)}")
    except (FateError, OSError) as error:
        raise SystemExit(f"gguf_export: {error}") from None


if __name__ == "__main__":
    main()
