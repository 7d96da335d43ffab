"""Builds a transformers config.json for a GGUF file from llama.cpp's metadata and the shapes of the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fate_moe.adapter.config_rules import EXPERT_COUNTS
from fate_moe.checkpoints.gguf_metadata import Metadata
from fate_moe.checkpoints.gguf_names import check_blocks
from fate_moe.checkpoints.gguf_rope import rope_parameters
from fate_moe.errors import CheckpointError, UnsupportedModelError

__all__ = ["ARCHITECTURES", "build_config", "find_model_type", "special_tokens"]

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
# Architectures that are not llama.cpp's language models.
_OTHERS = {
    "clip": "it is a vision projector (mmproj), not a language model; give the model's own file",
    "gptoss": "it is Ollama's own layout of gpt-oss; download a GGUF file of llama.cpp's architecture, 'gpt-oss'",
}
# llama.cpp's key, and the names of the setting in transformers' configs, of which the first that a config has is set. Positive
# integers:
_COUNTS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.sliding_window": ("sliding_window",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "expert_count": EXPERT_COUNTS,
    "expert_used_count": ("num_experts_per_tok", "moe_k"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "leading_dense_block_count": ("first_k_dense_replace", "moe_layer_start_index"),
    "interleave_moe_layer_step": ("moe_layer_interval",),
}
# Numbers:
_NUMBERS: dict[str, tuple[str, ...]] = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
    "expert_weights_scale": ("routed_scaling_factor",),
}
# Keys that llama.cpp requires: of every file, and of families whose transformers config has the setting.
_REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "expert_count",
    "expert_used_count",
)
_REQUIRED_WITH = {
    "kv_lora_rank": ("attention.kv_lora_rank", "rope.dimension_count"),
    "logits_scaling": ("logit_scale",),
    "moe_layer_interval": ("interleave_moe_layer_step",),
    "swiglu_limit": ("attention.sliding_window",),
}
# Defaults of llama.cpp, which are not those of transformers' configs.
_DEFAULTS = {
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "first_k_dense_replace": 0,
    "moe_layer_start_index": 0,
}
_ALWAYS: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}}
# The function that turns router scores into weights, by llama.cpp's number; softmax for families that are not listed.
_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3
_GATING = {
    "deepseek_v3": _SIGMOID,
    "dots1": _SIGMOID,
    "glm4_moe": _SIGMOID,
    "gpt_oss": _SOFTMAX_OF_CHOSEN,
    "minimax_m2": _SIGMOID,
}
_GATING_REQUIRED = ("dots1", "minimax_m2")
# Keys that repeat a tensor's size: the tensor, and the dimension.
_SIZES: dict[str, tuple[str, int]] = {
    "attention.q_lora_rank": ("attn_q_a.weight", 0),
    "embedding_length": ("attn_norm.weight", 0),
    "expert_count": ("ffn_gate_inp.weight", 0),
    "expert_feed_forward_length": ("ffn_down_exps.weight", 2),
    "expert_shared_feed_forward_length": ("ffn_down_shexp.weight", 1),
}
_EXPERT_ALONE = re.compile(r"^blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight$")
_SPECIAL_TOKENS = {"bos": ("bos",), "eos": ("eos", "eot", "eom"), "pad": ("padding",)}


def find_model_type(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """transformers' model type. Raises UnsupportedModelError for an architecture not in ARCHITECTURES, or without experts."""
    architecture = metadata.architecture
    if architecture in _OTHERS:
        raise UnsupportedModelError(_OTHERS[architecture])
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the GGUF architecture {architecture[:40]!r} is not supported; supported are {', '.join(ARCHITECTURES)}; "
            "use the model's safetensors"
        )
    if not metadata.peek("expert_count"):
        if any("_exps" in name or _EXPERT_ALONE.search(name) for name in shapes):
            metadata.require_count("expert_count")
        raise UnsupportedModelError(
            f"this {architecture!r} model has no experts, so there is nothing to offload; use a Mixture-of-Experts model"
        )
    families = ARCHITECTURES[architecture]
    if architecture == "deepseek2":
        return families[_has(shapes, "exp_probs_b") or metadata.peek("expert_gating_func") == _SIGMOID]
    return families[-1 if _has(shapes, "ffn_gate_shexp") else 0]


def build_config(
    family: str,
    metadata: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    tables: Mapping[str, list[float]] = MappingProxyType({}),
) -> tuple[dict[str, Any], set[str]]:
    """The content of config.json, and which of ``tables`` (rotary tables of the file, see gguf_rope) it contains.

    ``shapes`` are row-major, by tensor. Raises CheckpointError for metadata that is missing or contradicts the tensors,
    UnsupportedModelError for metadata that transformers' model cannot follow.
    """
    import transformers

    known = transformers.CONFIG_MAPPING[family]().to_dict()  # the family's settings with their defaults
    config: dict[str, Any] = {**{name: value for name, value in _DEFAULTS.items() if name in known}, **_ALWAYS.get(family, {})}
    for key in (*_REQUIRED, *(key for name, keys in _REQUIRED_WITH.items() if name in known for key in keys)):
        if metadata.peek(key) in (None, 0):
            metadata.require_number(key)
    _check_sizes(metadata, shapes)

    def put(names: tuple[str, ...], value: Any) -> bool:
        name = next((name for name in names if name in known), None)
        if name is not None and value is not None:
            config[name] = value
        return name is not None

    for key, names in _COUNTS.items():
        if any(name in known for name in names):
            put(names, metadata.count(key))
    for key, names in _NUMBERS.items():
        if any(name in known for name in names):
            put(names, metadata.number(key))
    if "norm_topk_prob" in known:
        put(("norm_topk_prob",), metadata.flag("expert_weights_norm"))
    if family == "deepseek_v2" and config["norm_topk_prob"]:
        raise UnsupportedModelError("expert_weights_norm with softmax routing is not supported for deepseek2; use safetensors")
    _check_routing(family, config, metadata)
    num_layers = metadata.require_count("block_count") - (metadata.count("nextn_predict_layers") or 0)
    if num_layers < 1:
        raise CheckpointError("its metadata counts no more layers than those that predict further tokens; download it again")
    check_blocks(shapes, num_layers, metadata.require_count("block_count"))
    _put_heads(known, config, metadata, shapes)
    # Widths come from the shapes, because older files lack these keys.
    expert_width = _expert_width(shapes)
    put(("moe_intermediate_size", "intermediate_size"), expert_width)
    if "moe_intermediate_size" in known and (dense := _first(shapes, "ffn_gate.weight")):
        _check_equal(metadata, "feed_forward_length", dense[0], "ffn_gate.weight", dense)
        config["intermediate_size"] = dense[0]
    metadata.take("feed_forward_length")
    metadata.take("expert_feed_forward_length")
    metadata.take("expert_shared_feed_forward_length")
    if shared := _first(shapes, "ffn_gate_shexp.weight"):
        put(("shared_expert_intermediate_size", "shared_intermediate_size"), shared[0])
        if put(("n_shared_experts", "moe_num_shared_experts"), shared[0] // expert_width):
            _check_equal(metadata, "expert_shared_count", shared[0] // expert_width, "ffn_gate_shexp.weight", shared)
            metadata.take("expert_shared_count")
    elif put(("n_shared_experts", "moe_num_shared_experts"), 0):
        _check_equal(metadata, "expert_shared_count", 0, "ffn_gate_shexp.weight", ())
    put(("attention_bias", "use_bias", "qkv_bias"), _has(shapes, "attn_q.bias") or _has(shapes, "attn_qkv.bias"))
    put(("use_qk_norm",), _has(shapes, "attn_q_norm"))
    if "mlp_only_layers" in known:
        config["mlp_only_layers"] = [layer for layer in range(num_layers) if not _has(shapes, f"blk.{layer}.ffn_gate_inp.")]
    put(("moe_layer_end_index",), num_layers - 1)
    put(("max_window_layers",), num_layers)  # no layer of these families has a window in llama.cpp
    if "attention_multiplier" in known and "attention_multiplier" not in config:
        config["attention_multiplier"] = (config["hidden_size"] // config["num_attention_heads"]) ** -0.5
    _check_window(family, metadata)
    config |= {"model_type": family, "num_hidden_layers": num_layers, "vocab_size": _rows(shapes, "token_embd.weight")}
    config |= {"tie_word_embeddings": "output.weight" not in shapes, "dtype": "bfloat16"}
    config["rope_parameters"], used = rope_parameters(family, config, metadata, tables)
    put(("rotary_dim",), metadata.count("rope.dimension_count"))
    _check_equal(metadata, "vocab_size", config["vocab_size"], "token_embd.weight", shapes["token_embd.weight"])
    metadata.take("vocab_size")
    metadata.check_all_used()
    return config, used


def special_tokens(fields: Mapping[str, Any], vocab_size: int) -> dict[str, int | list[int] | None]:
    """The ids of config.json. An id outside of the vocabulary is none, as in llama.cpp; every end of a turn ends the text."""
    ids: dict[str, int | list[int] | None] = {}
    for name, keys in _SPECIAL_TOKENS.items():
        given = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
        inside = list(dict.fromkeys(value for value in given if isinstance(value, int) and 0 <= value < vocab_size))
        ids[f"{name}_token_id"] = inside if len(inside) > 1 else next(iter(inside), None)
    return ids


def _put_heads(known: Mapping[str, Any], config: dict[str, Any], metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Sizes of the attention's heads, with llama.cpp's defaults.

    Raises CheckpointError for sizes that do not match the tensors, before the model allocates rotary buffers of these sizes, and
    UnsupportedModelError for values of another size than keys.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = metadata.count("attention.head_count_kv") or heads
    if "kv_lora_rank" in known:
        rotary = metadata.require_count("rope.dimension_count")
        key_dim, value_dim = (
            metadata.count(f"attention.{name}_length_mla") or metadata.require_count(f"attention.{name}_length")
            for name in ("key", "value")
        )
        for name in ("key", "value"):  # of the compressed form where the other is given
            metadata.take(f"attention.{name}_length")
        if key_dim <= rotary:
            raise CheckpointError(
                f"its metadata gives keys {key_dim} columns, of which {rotary} turn; download or convert it again"
            )
        config |= {"qk_rope_head_dim": rotary, "qk_nope_head_dim": key_dim - rotary, "v_head_dim": value_dim}
        config["num_key_value_heads"] = heads
        _check_rows(config["kv_lora_rank"] + rotary, shapes, "attn_kv_a_mqa.weight")
        config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
        return
    size, keys = metadata.count("attention.key_length") or hidden // heads, config["num_key_value_heads"]
    _check_rows(keys * size, shapes, "attn_k.weight")
    _check_rows((heads + 2 * keys) * size, shapes, "attn_qkv.weight")
    if (turned := metadata.count("rope.dimension_count") or size) > size or turned % 2:
        raise CheckpointError(f"its metadata turns {turned} of {size} columns of a head; download or convert it again")
    if metadata.count("attention.value_length") not in (None, size):
        raise UnsupportedModelError(
            "its metadata gives values other columns than keys, which transformers cannot express; use safetensors"
        )
    config["head_dim"] = size  # families without the setting read it too, or the tensors' shapes do not fit


def _check_rows(rows: int, shapes: Mapping[str, tuple[int, ...]], part: str) -> None:
    if (shape := _first(shapes, part)) is not None and shape[0] != rows:
        raise CheckpointError(
            f"its metadata's sizes of heads make {rows} rows of {part}, which is {list(shape)} "
            "(attention.head_count, head_count_kv, key_length, rope.dimension_count); download or convert it again"
        )


def _check_routing(family: str, config: Mapping[str, Any], metadata: Metadata) -> None:
    experts, used = metadata.require_count("expert_count"), metadata.require_count("expert_used_count")
    if used > experts:
        raise CheckpointError(
            f"its metadata takes {used} of {experts} experts (expert_used_count, expert_count); download or convert it again"
        )
    groups, chosen = config.get("n_group", 1), config.get("topk_group", 1)
    if groups > 1:
        metadata.require_count("expert_group_used_count")
    if experts % groups or chosen > groups or used * groups > experts * chosen:
        raise CheckpointError(
            f"its metadata takes {used} experts from {chosen} of {groups} groups of {experts} experts; download or convert it again"
        )
    wanted = _GATING.get(family, _SOFTMAX)
    if family in _GATING_REQUIRED:
        metadata.require_count("expert_gating_func")
    if (given := metadata.count("expert_gating_func")) not in (None, wanted):
        raise UnsupportedModelError(
            f"its metadata's expert_gating_func is {given}, and transformers' {family} has {wanted} "
            "(1 softmax, 2 sigmoid, 3 softmax of the chosen); use the model's safetensors"
        )


def _check_window(family: str, metadata: Metadata) -> None:
    """The only layers with a window are gpt-oss's even ones, in transformers and in llama.cpp."""
    pattern = metadata.peek("attention.sliding_window_pattern")
    if family != "gpt_oss" or pattern is None:
        return
    even = [layer % 2 == 0 for layer in range(len(pattern))] if isinstance(pattern, list) else 2
    if pattern != even:
        raise UnsupportedModelError("its metadata gives a window to other layers than every second; use the model's safetensors")
    metadata.mark("attention.sliding_window_pattern")


def _check_sizes(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> None:
    _rows(shapes, "token_embd.weight")
    for key, (part, dimension) in _SIZES.items():
        if (shape := _first(shapes, part)) is not None and dimension < len(shape):
            _check_equal(metadata, key, shape[dimension], part, shape)


def _check_equal(metadata: Metadata, key: str, size: int, part: str, shape: tuple[int, ...]) -> None:
    if metadata.peek(key) is not None and (given := metadata.take(key)) not in (0, size):
        raise CheckpointError(
            f"its metadata says {metadata.architecture}.{key} = {given}, but {part} is {list(shape) if shape else 'missing'}; "
            "download or convert it again"
        )


def _expert_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Columns of an expert's down matrix, stacked or one tensor an expert."""
    if stacked := _first(shapes, "ffn_down_exps.weight"):
        return stacked[-1]
    if alone := _first(shapes, "ffn_down.0.weight"):
        return alone[-1]
    raise CheckpointError("it has no tensors of experts (ffn_down_exps); download the whole model again")


def _rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if name not in shapes:
        raise CheckpointError(f"it lacks {name}; download all its files again")
    return shapes[name][0]


def _first(shapes: Mapping[str, tuple[int, ...]], part: str) -> tuple[int, ...] | None:
    return next((shape for name, shape in shapes.items() if re.fullmatch(rf"blk\.\d+\.{re.escape(part)}", name)), None)


def _has(shapes: Mapping[str, tuple[int, ...]], part: str) -> bool:
    return any(part in name for name in shapes)
