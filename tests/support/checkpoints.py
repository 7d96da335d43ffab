"""Tiny random checkpoints of every family, as save_pretrained writes them: real key names, deterministic weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The first layer is dense, the others have shared experts.
_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
# fmt: off
_SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 48, "head_dim": 16, "sliding_window": 16, "rope_parameters": _YARN},
    "granitemoe_swa": {
        "num_hidden_layers": 3, "num_local_experts": 8, "intermediate_size": 48, "shared_intermediate_size": 40, "head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 16,
        "layer_rope_theta": [0, 10000.0, 500.0], "embedding_multiplier": 4.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
    },
    "qwen3_next": {
        "num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 3,
        "shared_expert_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "mixtral": {"num_local_experts": 8, "intermediate_size": 48},
    "olmoe": {"num_experts": 8, "intermediate_size": 48},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16, "norm_topk_prob": True},
}
# fmt: on


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A transformers model of ``family`` with random weights: 2 layers (deepseek 3, the first dense) and 8 experts."""
    config = transformers.CONFIG_MAPPING[family](**{**_COMMON, **_SPECIAL[family], **overrides}, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("e_score_correction_bias"):
                    value.normal_(0, 0.05)
                elif value.ndim == 1 and "bias" not in name and "inv_freq" not in name:
                    value.uniform_(0.5, 1.5)  # norms (and attention sinks)
                elif isinstance(value, torch.nn.Parameter):
                    # Preserves the size of what goes through, so that routers see order 1 and spread their choices.
                    value.normal_(0, 0.1 if value.ndim == 1 else value.shape[-1] ** -0.5)
    return model.eval()


def tiny_checkpoint(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> Path:
    """``tiny_model`` saved in ``folder`` (returned) under the family's real checkpoint names; ``overrides`` go into the config."""
    tiny_model(family, dtype, seed, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
