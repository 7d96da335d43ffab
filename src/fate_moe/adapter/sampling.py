"""The options of ``generate()`` that a command line or a generation_config.json may give: which values have a meaning. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fate_moe.errors import StoreError
from fate_moe.io.bounded import read_bounded
from fate_moe.units import Range

__all__ = ["GREEDY_BELOW", "RANGES", "check_generation_config", "read_generation_config"]

# A smaller temperature would make the scores overflow; it is taken as greedy decoding.
GREEDY_BELOW = 1e-5
_COUNT = Range(0, (1 << 31) - 1, whole=True)
_SHARE = Range(0, 1)
RANGES = {
    "temperature": Range(0, 1e6),
    "top_k": _COUNT,
    "top_p": _SHARE,
    "min_p": _SHARE,
    "repetition_penalty": Range(0.01, 100),
    "num_beams": Range(1, 1024, whole=True),
}
# Further numbers of a generation_config.json.
_OTHER_RANGES = {
    "typical_p": Range(0, 1, above=True),
    "top_h": _SHARE,
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
    "encoder_repetition_penalty": Range(0.01, 100),
    "length_penalty": Range(-100, 100),
    "no_repeat_ngram_size": _COUNT,
    "encoder_no_repeat_ngram_size": _COUNT,
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "max_length": _COUNT,
    "max_new_tokens": Range(1, (1 << 31) - 1, whole=True),
    "max_time": Range(0, 1e9, above=True),
}
_FLAGS = ("do_sample", "renormalize_logits", "remove_invalid_values", "use_cache")
_TOKENS = (
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
)
# What needs another model, code from the hub, or a second sequence beside the prompt, and the values that ask for none of it.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "constraints": (),
    "diversity_penalty": (0, 0.0),
    "dola_layers": (),
    "force_words_ids": (),
    "guidance_scale": (1, 1.0),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0, 0.0),
    "prompt_lookup_num_tokens": (),
    "token_healing": (False,),
    "use_mtp": (False,),
}
# Options that choose caches and kernels, of which the engine has its own, or the form of the output.
_IGNORED = (
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "disable_compile",
    "low_memory",
    "max_cache_len",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "return_dict_in_generate",
)


def read_generation_config(path: Path, num_rows: int) -> dict[str, Any]:
    """The options for ``generate()`` in the generation_config.json ``path``; ``num_rows`` is the size of the vocabulary.

    Options about caches and compilation are dropped, a temperature of 0 becomes greedy decoding. Raises StoreError, naming
    file and field, for values without a meaning and for options that this engine does not have.
    """
    try:
        raw = json.loads(read_bounded(path).decode("utf-8-sig"))
        if not isinstance(raw, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"{path} cannot be read ({reason}); copy it from the checkpoint again") from error
    options = {name: value for name, value in raw.items() if value is not None and name not in _IGNORED}
    check_generation_config(options, path, num_rows)
    if options.get("temperature", 1.0) < GREEDY_BELOW:
        options = {**options, "do_sample": False, "temperature": 1.0}
    return options


def check_generation_config(options: Mapping[str, Any], path: Path, num_rows: int) -> None:
    """Raise StoreError, naming ``path`` and the field, for a value of ``options`` that has no meaning here."""
    for name, value in options.items():
        allowed = RANGES.get(name) or _OTHER_RANGES.get(name)
        if allowed is not None and not allowed.holds(value):
            raise _error(path, name, value, f"is {allowed}")
        if name in _FLAGS and not isinstance(value, bool):
            raise _error(path, name, value, "is true or false")
        if name in _TOKENS and not all(type(token) is int and 0 <= token < num_rows for token in _flat(value)):
            raise _error(path, name, value, f"names tokens of the model, from 0 to {num_rows - 1}")
        if name in _REFUSED and value not in _REFUSED[name]:
            raise StoreError(f"{path}: this engine does not do {name} ({_short(value)}); remove it from the file")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _error(path: Path, name: str, value: Any, expected: str) -> StoreError:
    return StoreError(f"{path}: {name} {expected}, not {_short(value)}; correct it there")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
