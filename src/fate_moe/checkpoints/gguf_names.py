"""Which tensors of a GGUF file make a parameter of transformers' model, and how: names are the gguf package's own maps.

What the maps cannot say is here: experts are stacked in GGUF, gate and up apart; llama.cpp turns the rows of some queries and keys
for its rotary positions, splits what DeepSeek decompresses into keys and values, and unzips gpt-oss's gates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["Source", "find_sources"]

# Rotary positions over neighbouring rows: llama.cpp's converter reorders query and key for them.
_TURNED = ("llama", "granitemoe")


@dataclass(frozen=True)
class Source:
    """``parts`` are the file's tensors (for experts [experts, ...], or [1, ...] of one), ``join`` makes of them the parameter."""

    parts: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]


def find_sources(model: Any, architecture: str, names: Collection[str]) -> dict[str, Source]:
    """By the name of each parameter (or persistent buffer) of ``model`` for which the file has all tensors of ``names``."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    mapped = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = {name: _source(name, architecture, model.config, mapped, names) for name in model.state_dict()}
    return {name: source for name, source in found.items() if source is not None and all(part in names for part in source.parts)}


def _source(name: str, architecture: str, config: Any, mapped: Any, names: Collection[str]) -> Source | None:
    inside = re.search(r"layers\.(\d+)\.(.*)", name)
    block, rest = (f"blk.{inside[1]}.", inside[2]) if inside else ("", name)
    if of_experts := re.search(r"\.experts\.(gate_up|down)_proj(_bias)?$", name):
        return _of_experts(block, architecture, of_experts[1], "bias" if of_experts[2] else "weight", names)
    if rest.endswith("e_score_correction_bias"):
        return Source((f"{block}exp_probs_b.bias",), _alone)
    if rest.endswith("shared_mlp.input_linear.weight"):
        return Source((f"{block}ffn_gate_shexp.weight", f"{block}ffn_up_shexp.weight"), torch.cat)
    if rest.endswith("block_sparse_moe.router.weight"):
        return Source((f"{block}ffn_gate_inp.weight",), _alone)
    if rest.endswith("kv_b_proj.weight") and f"{block}attn_k_b.weight" in names:
        return Source((f"{block}attn_k_b.weight", f"{block}attn_v_b.weight"), _compressed)
    part = mapped.get_name(name, try_suffixes=(".weight", ".bias"))
    if part is None:
        return None
    part = part if part in names else f"{part}.weight"  # gpt-oss's sinks, a parameter without a suffix
    for letter, heads in (("q", config.num_attention_heads), ("k", getattr(config, "num_key_value_heads", 0))):
        if architecture in _TURNED and f".attn_{letter}." in part:
            return Source((part,), partial(_turned_back, heads=heads))
    return Source((part,), _alone)


def _of_experts(block: str, architecture: str, matrix: str, kind: str, names: Collection[str]) -> Source:
    down, both = f"{block}ffn_down_exps.{kind}", f"{block}ffn_gate_up_exps.{kind}"
    halves = (f"{block}ffn_gate_exps.{kind}", f"{block}ffn_up_exps.{kind}")
    if architecture == "gpt-oss":
        if kind == "bias":
            return Source((down,), _alone) if matrix == "down" else Source(halves, _zipped)
        if matrix == "down":
            return Source((down,), lambda tensors: tensors[0].mT)
        return Source(halves, lambda tensors: _zipped(tensors).mT)
    if matrix == "down" or both in names:
        return Source((down if matrix == "down" else both,), _alone)
    return Source(halves, lambda tensors: torch.cat(tensors, dim=1))


def _alone(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _zipped(tensors: list[Tensor]) -> Tensor:
    """Rows of gate and up in turns: two [experts, rows, ...] to [experts, 2 * rows, ...]."""
    return torch.stack(tensors, dim=2).flatten(1, 2)


def _compressed(tensors: list[Tensor]) -> Tensor:
    """Keys [heads, rank, of a key] and values [heads, of a value, rank] to what decompresses both, [heads * (both), rank]."""
    keys, values = tensors
    return torch.cat([keys.mT, values], dim=1).flatten(0, 1)


def _turned_back(tensors: list[Tensor], heads: int) -> Tensor:
    """Rows (or entries) of each head: from x0 y0 x1 y1 ... back to x0 x1 ... y0 y1 ..."""
    (tensor,) = tensors
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
