"""Builds a transformers config.json for a GGUF file from llama.cpp's metadata and the shapes of the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fate_moe.errors import UnsupportedModelError

__all__ = ["ARCHITECTURES", "build_config", "find_model_type"]

# llama.cpp's supported architectures with experts, and the transformers model types that each may be.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "deepseek2": ("deepseek_v2", "deepseek_v3"),
    "dots1": ("dots1",),
    "ernie4_5-moe": ("ernie4_5_moe",),
    "glm4moe": ("glm4_moe",),
    "gpt-oss": ("gpt_oss",),
    "granitemoe": ("granitemoe", "granitemoeshared"),
    "llama": ("mixtral",),
    "minimax-m2": ("minimax_m2",),
    "olmoe": ("olmoe",),
    "qwen2moe": ("qwen2_moe",),
    "qwen3moe": ("qwen3_moe",),
}
# llama.cpp's key, and the names of the setting in transformers' configs; the first name that a config has is set.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_k"),
    "expert_weights_scale": ("routed_scaling_factor",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "leading_dense_block_count": ("first_k_dense_replace", "moe_layer_start_index"),
    "interleave_moe_layer_step": ("moe_layer_interval",),
}
# Defaults of llama.cpp that differ from transformers'.
_DEFAULTS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "q_lora_rank": None}
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_ALWAYS: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}}


def find_model_type(architecture: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """transformers' model type. Raises UnsupportedModelError for an architecture not in ARCHITECTURES, or without experts."""
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(f"the GGUF architecture {architecture!r} is not supported; supported are {known}")
    if not metadata.get("expert_count"):
        raise UnsupportedModelError(
            f"this {architecture!r} model has no experts, so there is nothing to offload; use a Mixture-of-Experts model"
        )
    families = ARCHITECTURES[architecture]
    if architecture == "deepseek2":
        return families[_has(shapes, "exp_probs_b")]
    return families[-1 if _has(shapes, "ffn_gate_shexp") else 0]


def build_config(family: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The content of config.json. ``metadata`` is without the architecture's prefix, ``shapes`` are row-major, by tensor.

    Raises UnsupportedModelError for a rotary scaling other than linear and yarn.
    """
    import transformers

    known = transformers.CONFIG_MAPPING[family]().to_dict()  # the family's settings with their defaults
    config: dict[str, Any] = {**{name: value for name, value in _DEFAULTS.items() if name in known}, **_ALWAYS.get(family, {})}

    def put(names: tuple[str, ...], value: Any) -> None:
        name = next((name for name in names if name in known), None)
        if name is not None and value is not None and not isinstance(value, list):
            config[name] = value

    for key, names in _SETTINGS.items():
        put(names, metadata.get(key))
    num_layers = int(metadata["block_count"]) - int(metadata.get("nextn_predict_layers") or 0)
    if "kv_lora_rank" in known:
        rotary = int(metadata["rope.dimension_count"])
        key_dim, value_dim = (
            metadata.get(f"attention.{name}_length_mla", metadata[f"attention.{name}_length"]) for name in ("key", "value")
        )
        config |= {"qk_rope_head_dim": rotary, "qk_nope_head_dim": key_dim - rotary, "v_head_dim": value_dim}
        config["num_key_value_heads"] = config["num_attention_heads"]
        config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    elif rows := _first(shapes, "attn_k.weight"):
        put(("head_dim",), rows[0] // config["num_key_value_heads"])
    # The rest comes from the shapes, because older files lack these keys.
    expert_width = (_first(shapes, "ffn_down_exps.weight") or (0, 0, 0))[2]
    put(("moe_intermediate_size", "intermediate_size"), expert_width)
    if "moe_intermediate_size" in known and (dense := _first(shapes, "ffn_gate.weight")):
        config["intermediate_size"] = dense[0]
    if shared := _first(shapes, "ffn_gate_shexp.weight"):
        put(("shared_expert_intermediate_size", "shared_intermediate_size"), shared[0])
        put(("n_shared_experts", "moe_num_shared_experts"), shared[0] // expert_width)
    put(("attention_bias", "use_bias"), _has(shapes, "attn_q.bias"))
    put(("use_qk_norm",), _has(shapes, "attn_q_norm"))
    if "mlp_only_layers" in known:
        config["mlp_only_layers"] = [layer for layer in range(num_layers) if f"blk.{layer}.ffn_down_exps.weight" not in shapes]
    config |= {"model_type": family, "num_hidden_layers": num_layers, "vocab_size": shapes["token_embd.weight"][0]}
    config |= {"tie_word_embeddings": "output.weight" not in shapes, "dtype": "bfloat16"}
    config |= {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()}
    config["rope_parameters"] = _rotary(family, config, metadata)
    put(("rotary_dim",), metadata.get("rope.dimension_count"))
    return config


def _rotary(family: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    kind = metadata.get("rope.scaling.type") or "none"
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base") or 10000.0)}
    rotary_dim, head_dim = metadata.get("rope.dimension_count"), config.get("head_dim")
    if rotary_dim and head_dim and rotary_dim < head_dim:
        rotary["partial_rotary_factor"] = rotary_dim / head_dim
    if kind in ("linear", "yarn"):
        rotary |= {"rope_type": kind, "factor": float(metadata["rope.scaling.factor"])}
    elif kind != "none":
        raise UnsupportedModelError(f"rotary scaling {kind!r} is not supported for GGUF; use the checkpoint in safetensors")
    if kind == "yarn":
        rotary["original_max_position_embeddings"] = int(metadata["rope.scaling.original_context_length"])
        for key, name in (("attn_factor", "attention_factor"), ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := metadata.get(f"rope.scaling.{key}")) is not None:
                rotary[name] = float(value)
        if (log_multiplier := metadata.get("rope.scaling.yarn_log_multiplier")) and "kv_lora_rank" in config:
            # A tenth of DeepSeek's mscale_all_dim. GGUF does not store mscale; published models give both the same value.
            rotary["mscale"] = rotary["mscale_all_dim"] = float(log_multiplier) * 10
        if family == "gpt_oss":
            rotary["truncate"] = False
    return rotary


def _first(shapes: Mapping[str, tuple[int, ...]], part: str) -> tuple[int, ...] | None:
    return next((shape for name, shape in shapes.items() if re.fullmatch(rf"blk\.\d+\.{re.escape(part)}", name)), None)


def _has(shapes: Mapping[str, tuple[int, ...]], part: str) -> bool:
    return any(part in name for name in shapes)
