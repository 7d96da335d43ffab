"""Reads config.json, and checks the rules that transformers does not enforce: where one is broken it warns or computes NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fate_moe.errors import CheckpointError, ConfigError
from fate_moe.io.json_file import read_json

__all__ = ["EXPERT_COUNTS", "broken_config_rule", "longest_context", "read_config", "refuse_beyond"]

# What families call the number of experts in a layer.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

_COUNTS = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_MOST_LAYERS = 10_000  # more than any model has, and few enough to build
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon")
# Of rope_parameters; each is absent, None, or a number above zero.
_ROPE_NUMBERS = (
    "factor",
    "rope_theta",
    "attention_factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "partial_rotary_factor",
)
_ROPE_LISTS = ("short_factor", "long_factor")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``folder``'s config.json. Raises CheckpointError if it is missing, unreadable or no JSON object."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object but {type(config).__name__}; take the config.json of the checkpoint")
    return config


def longest_context(config: Any) -> int | None:
    """How many tokens the model of ``config`` (transformers' object) was made for; None where it does not say."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def refuse_beyond(asked: int | None, config: Any, beams: int = 1) -> None:
    """Raise ConfigError where ``asked`` tokens of context, of all ``beams``, are more than the model of ``config`` was made for."""
    longest = longest_context(config)
    if asked is not None and longest is not None and asked > longest * beams:
        each = f" in each of {beams} beams" if beams > 1 else ""
        raise ConfigError(
            f"--context-length {asked} is more than this model was made for: {longest} tokens{each}; give at most "
            f"{longest * beams}, or scale its rotary embedding in config.json"
        )


def broken_config_rule(config: Any) -> str | None:
    """The first rule that ``config`` (transformers' object) or a part of it breaks, in words, or None."""
    return next(_broken(config, ""), None)


def _broken(config: Any, where: str) -> Iterator[str]:
    for name in (*_COUNTS, "rope_theta"):
        value = _entry(config, name)
        if value is not None and not isinstance(value, list | tuple | dict) and not _is_number(value, above=0):
            yield f"{where}{name} is {value!r}, and a number above 0 is expected"
    for name in (*EXPERT_COUNTS, "num_experts_per_tok"):
        value = _entry(config, name)
        if value is not None and not isinstance(value, list | tuple) and (type(value) is not int or value < 0):
            yield f"{where}{name} is {value!r}, and a whole number is expected"
    if (layers := _entry(config, "num_hidden_layers") or 0) > _MOST_LAYERS:
        yield f"{where}num_hidden_layers is {layers}, and at most {_MOST_LAYERS} are expected"
    for name in _EPSILONS:
        value = _entry(config, name)
        if value is not None and not (_is_number(value, above=-1) and 0 <= value < 1):
            yield f"{where}{name} is {value!r}, and a small number from 0 is expected"
    rope = _entry(config, "rope_parameters")
    if isinstance(rope, dict):
        nested = [(f"{where}rope_parameters.{key}", value) for key, value in rope.items() if isinstance(value, dict)]
        for place, parameters in nested or [(f"{where}rope_parameters", rope)]:
            yield from _broken_rope(parameters, place)
    for name in getattr(config, "sub_configs", None) or ():
        if (part := _entry(config, name)) is not None:
            yield from _broken(part, f"{where}{name}.")


def _entry(config: Any, name: str) -> Any:
    """None also where a configuration whose layers differ refuses to name one value for all."""
    try:
        return getattr(config, name, None)
    except Exception:  # a class of transformers' own, which moves
        return None


def _broken_rope(rope: dict[str, Any], where: str) -> Iterator[str]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"default", "axial", "mrope", *ROPE_INIT_FUNCTIONS}
    if kind not in known:
        yield f"{where} has the type {kind!r}, and {', '.join(sorted(known))} are known; update transformers if it is new"
    for name in _ROPE_NUMBERS:
        if rope.get(name) is not None and not _is_number(rope[name], above=0):
            yield f"{where}.{name} is {rope[name]!r}, and a number above 0 is expected"
    for name in _ROPE_LISTS:
        values = rope.get(name)
        if values is not None and not (isinstance(values, list | tuple) and all(_is_number(value, above=0) for value in values)):
            yield f"{where}.{name} is no list of numbers above 0"
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if kind == "llama3" and low is not None and high is not None and _is_number(low, above=0) and not high > low:
        yield f"{where}.high_freq_factor {high!r} is not above low_freq_factor {low!r}"


def _is_number(value: Any, above: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > above
