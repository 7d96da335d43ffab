"""Rotary positions of a GGUF file as transformers' ``rope_parameters``.

llama.cpp rotates pair i of a head at position p by the angle p / (base^(2i/n) * factor * table_i) and multiplies the result by
attn_factor. ``table`` is a tensor of the file, in which Llama 3's scaling and LongRoPE are stored. transformers' longrope is the
same formula; where the file has one table, it is both the long and the short one. YaRN has a formula of its own (``_yarn``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fate_moe.checkpoints.gguf_metadata import Metadata
from fate_moe.errors import CheckpointError, UnsupportedModelError

__all__ = ["TABLES", "rope_parameters"]

_ALWAYS, _LONG, _SHORT = TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# The architectures for which llama.cpp applies these tensors.
_WITH_TABLES = ("llama", "granitemoe")
# Families that can rotate only a part of each head; transformers' default for them is a half.
_PARTIAL = ("glm4_moe", "minimax_m2")
_DEFAULT_BASE = 10000.0  # llama.cpp's, for a file without rope.freq_base


def rope_parameters(
    family: str, config: Mapping[str, Any], metadata: Metadata, tables: Mapping[str, list[float]]
) -> tuple[dict[str, Any], set[str]]:
    """``rope_parameters``, and which of ``tables`` (those of TABLES that the file has) they contain.

    Raises UnsupportedModelError for a scaling that transformers cannot express, CheckpointError for one without its numbers.
    """
    base = metadata.number("rope.freq_base") or _DEFAULT_BASE
    if metadata.number("rope.freq_base_swa") not in (None, base):
        raise UnsupportedModelError(
            "its metadata gives local layers another rope.freq_base, which is not supported; use safetensors"
        )
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    head: int = config.get("head_dim", 0)
    turned = metadata.count("rope.dimension_count") or head
    if family in _PARTIAL:
        rotary["partial_rotary_factor"] = turned / head
    # llama.cpp takes a factor without a type for a linear one; rope.scale_linear is the key's old name.
    kind = metadata.take("rope.scaling.type") or "linear"
    factor = metadata.number("rope.scaling.factor") or metadata.number("rope.scale_linear") or 1.0
    length = metadata.number("rope.scaling.attn_factor") or 1.0
    original = metadata.count("rope.scaling.original_context_length") or config["max_position_embeddings"]
    if kind == "yarn":
        if _ALWAYS in tables:
            raise UnsupportedModelError(f"{_ALWAYS} together with YaRN is not supported; use the model's safetensors")
        return rotary | _yarn(family, config, metadata, length, original), set()
    if kind not in ("none", "linear", "longrope"):
        raise UnsupportedModelError(f"rotary scaling {str(kind)[:40]!r} is not supported for GGUF; use the model's safetensors")
    wanted = (_LONG, _SHORT) if kind == "longrope" else (_ALWAYS,)
    long, short = tables.get(wanted[0]), tables.get(wanted[-1])
    if kind == "longrope" and (metadata.architecture not in _WITH_TABLES or not long or not short or factor != 1.0):
        raise UnsupportedModelError(
            f"rotary scaling 'longrope' is read for {', '.join(_WITH_TABLES)} with {_LONG} and {_SHORT} and without a factor only; "
            "use the model's safetensors"
        )
    factor = 1.0 if kind == "none" else factor
    if kind != "longrope" and long and set(long) == {1.0}:
        long = short = None
    if long and short and metadata.architecture in _WITH_TABLES:
        _check_table(wanted, (long, short), turned)
    elif length == 1.0:
        return rotary | ({"rope_type": "linear", "factor": factor} if factor != 1.0 else {}), set()
    else:
        raise UnsupportedModelError(
            f"rope.scaling.attn_factor {length:g} with {kind!r} is not supported; use the model's safetensors"
        )
    rotary |= {
        "rope_type": "longrope",
        "long_factor": [value * factor for value in long],
        "short_factor": [value * factor for value in short],
        "factor": 1.0,
        "attention_factor": length,
        "original_max_position_embeddings": original,
    }
    return rotary, set(wanted)


def _yarn(family: str, config: Mapping[str, Any], metadata: Metadata, length: float, original: int) -> dict[str, Any]:
    factor = metadata.require_number("rope.scaling.factor")
    made: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    # The converter writes transformers' attention_factor as yarn_attn_factor; attn_factor multiplies what follows from the factor.
    if (whole := metadata.number("rope.scaling.yarn_attn_factor")) is not None:
        made["attention_factor"] = whole * length
    elif length != 1.0:
        made["attention_factor"] = (0.1 * math.log(factor) + 1.0) * length
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if (value := metadata.number(f"rope.scaling.{key}")) is not None:
            made[name] = value
    if "kv_lora_rank" in config:
        if "attention_factor" in made:
            raise UnsupportedModelError(
                "rope.scaling.attn_factor is not supported for latent attention; use the model's safetensors"
            )
        if (log_multiplier := metadata.number("rope.scaling.yarn_log_multiplier")) is not None:
            # A tenth of DeepSeek's mscale_all_dim. GGUF does not store mscale; published models give both the same value.
            made["mscale"] = made["mscale_all_dim"] = log_multiplier * 10
    if family == "gpt_oss":
        made["truncate"] = False
    return made


def _check_table(names: tuple[str, ...], tables: tuple[list[float], list[float]], turned: int) -> None:
    for name, table in zip(names, tables, strict=False):
        if len(table) != turned // 2 or not all(math.isfinite(value) and value > 0 for value in table):
            raise CheckpointError(f"{name} is not a table of {turned // 2} positive numbers; download or convert it again")
