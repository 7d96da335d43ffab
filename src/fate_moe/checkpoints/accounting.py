"""Accounts for every tensor of a checkpoint: read, or left out for a known reason, or the checkpoint is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from fate_moe.checkpoints.files import SAME_PLACE, some
from fate_moe.checkpoints.mapping import Matched, match_names
from fate_moe.checkpoints.source import Checkpoint
from fate_moe.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["account", "refuse_missing"]

_MTP = "next-token prediction (MTP), which generation does not use"
_ROTARY = "a buffer that is computed from config.json"
_TOWER = "a part for images or sound, which the text model does not have"
_KV_SCALE = "a scale of a quantized KV cache, which is kept exact here"
_ZEROS = "a bias of zeros, which the model does not have"

# "model.layers.3.": a numbered list of modules and a number of it.
_IN_LIST = re.compile(r"(.*?)\.(\d+)\.")
# What a decoder layer has only if it predicts further tokens: it joins the last hidden state with the next embedding.
_MTP_LAYER = re.compile(r"(eh_proj|enorm|hnorm|shared_head|embed_tokens|mtp\w*|nextn\w*)\b")
_MTP_NAMES = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn\w*)\.")
_MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_BUFFERS = re.compile(r"(^|\.)((original_)?inv_freq|cos_cached|sin_cached|freqs_cis|position_ids|masked_bias)$")
_ADAPTER = re.compile(r"\blora_|\.base_layer\.|modules_to_save")
_NOT_FOR_TEXT = re.compile(r"(Model|Classification|QuestionAnswering|MaskedLM|Embedding|RewardModel)$")
_KV_SCALES = re.compile(r"\.(attn|attention|self_attn|[kv]_proj)\.(k|v|kv)_scale$")
_TOWERS = re.compile(
    r"visual|vit|vision_(tower|model|encoder|embed_tokens)|multi_modal_projector|mm_projector|image_newline|embed_(vision|audio)"
    r"|audio_(tower|model|encoder)|speech_encoder|talker|code2wav|token2wav"
)


def account(model: PreTrainedModel, checkpoint: Checkpoint, matched: Matched) -> dict[str, str]:
    """Why each tensor that ``model`` does not use is not read, by name, ``checkpoint.unread`` among them.

    Raises UnsupportedModelError naming the tensors for which no reason is known, CheckpointError where two tensors are one
    parameter and differ.
    """
    reasons = _reasons(model, checkpoint, matched.unknown)
    if foreign := {name: target for name, target in matched.unknown.items() if name not in reasons}:
        raise UnsupportedModelError(
            f"{_where(checkpoint)}: {some(list(foreign))} {'is' if len(foreign) == 1 else 'are'} not part of the "
            f"{type(model).__name__} that config.json describes; {_advice(model, foreign, [])}"
        )
    for name, other in matched.rivals.items():
        facts = [(checkpoint.shape(key), checkpoint.dtype(key)) for key in (name, other)]
        if facts[0] != facts[1] or not torch.equal(checkpoint.read(name), checkpoint.read(other)):
            raise CheckpointError(f"{_where(checkpoint)}: {other} and {name} are one parameter and differ; delete one of them")
        reasons[name] = f"a copy of {other}"
    return {**checkpoint.unread, **reasons}


def refuse_missing(model: PreTrainedModel, checkpoint: Checkpoint, matched: Matched, missing: list[str]) -> None:
    """Raise CheckpointError, with the remedy, if parameters are ``missing``."""
    if not missing:
        return
    lacks = f"{_where(checkpoint)} lacks {some(missing)}, which the model needs"
    named = match_names(model, checkpoint.absent).recipes
    if sources := sorted(name for target in missing if target in named for name in named[target].all_sources):
        raise CheckpointError(f"{lacks}: {sources[0]}: {checkpoint.absent[sources[0]]}")
    reasons = _reasons(model, checkpoint, matched.unknown)
    foreign = {name: target for name, target in matched.unknown.items() if name not in reasons}
    raise CheckpointError(f"{lacks}; {_advice(model, foreign, missing)}")


def _where(checkpoint: Checkpoint) -> str:
    """What the user gave: the folder, or a file that is a checkpoint of its own."""
    first = checkpoint.files[0]
    return str(checkpoint.folder if first.is_relative_to(checkpoint.folder) else first)


def _reasons(model: PreTrainedModel, checkpoint: Checkpoint, unknown: dict[str, str]) -> dict[str, str]:
    """Of the names that the model does not know, those for which a reason is known."""
    depths, parts = _depths(model.state_dict()), {part for name in model.state_dict() for part in name.split(".")}
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    there = set(checkpoint.names)
    left_out = f"transformers leaves it out of {model.config.model_type}"
    beyond: dict[tuple[str, int], list[str]] = {}
    reasons: dict[str, str] = {}
    for name, target in unknown.items():
        listed = _IN_LIST.match(target)
        if listed and int(listed[2]) >= depths.get(listed[1], 1 << 62):
            beyond.setdefault((listed[1], int(listed[2])), []).append(name)
        elif _MTP_NAMES.search(target):
            reasons[name] = _MTP
        elif _BUFFERS.search(target):
            reasons[name] = _ROTARY
        elif _KV_SCALES.search(target):
            reasons[name] = _KV_SCALE
        elif any(_TOWERS.fullmatch(part) for part in set(target.split(".")) - parts):
            reasons[name] = _TOWER
        elif _matches(patterns, target):
            reasons[name] = left_out
        elif name.removesuffix(".bias") + ".weight" in there and _is_zero_bias(checkpoint, name):
            reasons[name] = _ZEROS
    # A numbered layer after the last is left out only if it is of another kind: a layer dropped by a wrong count must not be.
    text: Any = model.config.get_text_config()
    counted = any(type(count := getattr(text, key, None)) is int and count > 0 for key in _MTP_COUNTS)
    ordinary = {(listed[1], name[listed.end() :]) for name in model.state_dict() if (listed := _IN_LIST.match(name))}
    for (prefix, number), names in beyond.items():
        inside = [unknown[name].removeprefix(f"{prefix}.{number}.") for name in names]
        listed_by_family = number == depths[prefix] and all(_matches(patterns, unknown[name]) for name in names)
        odd = any((prefix, name) not in ordinary for name in inside)
        if any(_MTP_LAYER.match(name) for name in inside) or (odd and (counted or listed_by_family)):
            reasons |= dict.fromkeys(names, _MTP)
        else:
            reasons |= {name: _ROTARY for name in names if _BUFFERS.search(name)}
    return reasons


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.search(name) for pattern in patterns)


def _depths(names: Iterable[str]) -> dict[str, int]:
    """Of each numbered list of modules, how many it has."""
    depths: dict[str, int] = {}
    for name in names:
        if listed := _IN_LIST.match(name):
            depths[listed[1]] = max(depths.get(listed[1], 0), int(listed[2]) + 1)
    return depths


def _is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Whether ``name`` is a bias of zeros beside a weight (GPTQ's tools write one for every matrix)."""
    return name.endswith(".bias") and len(checkpoint.shape(name)) == 1 and not bool(checkpoint.read(name).any())


def _advice(model: PreTrainedModel, foreign: dict[str, str], missing: list[str]) -> str:
    """What to do about ``foreign`` tensors (and the parameters that they would be) and ``missing`` parameters."""
    if any(_ADAPTER.search(name) for name in foreign):
        return "it holds an adapter that was not merged; merge it first (peft: merge_and_unload, then save_pretrained)"
    if prefixes := _other_prefix(foreign.values(), missing):
        theirs, ours = prefixes
        return f"its names begin with {theirs!r} where the model's begin with {ours!r}; rename its tensors, and the index with them"
    named = str((getattr(model.config, "architectures", None) or [""])[0])
    if _NOT_FOR_TEXT.search(named):
        return f"config.json names {named}, which does not write text; use the checkpoint of the language model"
    parameters = model.state_dict()
    depths, there = _depths(parameters), _depths([*foreign.values(), *(parameters.keys() - set(missing))])
    for prefix, depth in depths.items():
        odd = [name for name in (*foreign.values(), *missing) if name.startswith(f"{prefix}.")]
        if odd and (found := there.get(prefix, 0)) != depth:
            return f"config.json describes {depth} {prefix}, and the checkpoint has {found}; {SAME_PLACE}"
    output = model.get_output_embeddings()
    if len(missing) == 1 and any(module is output for path, module in model.named_modules() if missing[0] == f"{path}.weight"):
        return "if the model shares it with its embedding, set tie_word_embeddings to true in config.json"
    return SAME_PLACE


def _other_prefix(foreign: Iterable[str], missing: list[str]) -> tuple[str, str] | None:
    """(prefix of a foreign name, prefix of a missing one) where the rest of the two, at least two parts, is the same."""
    by_ending: dict[str, str] = {}
    for target in missing:
        parts = target.split(".")
        for first in range(len(parts) - 1):
            by_ending.setdefault(".".join(parts[first:]), target)
    for name in foreign:
        parts = name.split(".")
        for first in range(1, len(parts) - 1):
            ending = ".".join(parts[first:])
            if ending in by_ending:
                return name.removesuffix(ending), by_ending[ending].removesuffix(ending)
    return None
