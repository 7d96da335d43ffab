"""Finds the tensors of a GGUF file that make each parameter of transformers' model, by the gguf package's name maps.

This module adds what the maps do not cover. GGUF stacks experts and stores gate_proj and up_proj separately. llama.cpp interleaves
the rows of some query and key matrices for its rotary positions, splits DeepSeek's kv_b_proj into keys and values, and stores the
alternating rows of gpt-oss's gate_up_proj as two tensors.
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

# Architectures whose query and key rows llama.cpp's converter interleaves for its rotary positions.
_INTERLEAVED = ("llama", "granitemoe")


@dataclass(frozen=True)
class Source:
    """``parts`` are tensors of the file (experts: [experts, ...], or [1, ...] for one); ``join`` makes the parameter from them."""

    parts: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]


def find_sources(model: Any, architecture: str, names: Collection[str]) -> dict[str, Source]:
    """The source of each parameter (or persistent buffer) of ``model`` whose tensors are all among the file's ``names``."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    mapped = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    sources = {name: _source(name, architecture, model.config, mapped, names) for name in model.state_dict()}
    return {name: source for name, source in sources.items() if source is not None and all(part in names for part in source.parts)}


def _source(name: str, architecture: str, config: Any, mapped: Any, names: Collection[str]) -> Source | None:
    inside = re.search(r"layers\.(\d+)\.(.*)", name)
    block, rest = (f"blk.{inside[1]}.", inside[2]) if inside else ("", name)
    if matched := re.search(r"\.experts\.(gate_up|down)_proj(_bias)?$", name):
        return _expert_source(block, architecture, matched[1], "bias" if matched[2] else "weight", names)
    if rest.endswith("e_score_correction_bias"):
        return Source((f"{block}exp_probs_b.bias",), _single)
    if rest.endswith("shared_mlp.input_linear.weight"):
        return Source((f"{block}ffn_gate_shexp.weight", f"{block}ffn_up_shexp.weight"), torch.cat)
    if rest.endswith("block_sparse_moe.router.weight"):
        return Source((f"{block}ffn_gate_inp.weight",), _single)
    if rest.endswith("kv_b_proj.weight") and f"{block}attn_k_b.weight" in names:
        return Source((f"{block}attn_k_b.weight", f"{block}attn_v_b.weight"), _join_kv_b)
    part = mapped.get_name(name, try_suffixes=(".weight", ".bias"))
    if part is None:
        return None
    part = part if part in names else f"{part}.weight"  # gpt-oss's sinks, a parameter without a suffix
    for letter, heads in (("q", config.num_attention_heads), ("k", getattr(config, "num_key_value_heads", 0))):
        if architecture in _INTERLEAVED and f".attn_{letter}." in part:
            return Source((part,), partial(_deinterleave, heads=heads))
    return Source((part,), _single)


def _expert_source(block: str, architecture: str, matrix: str, kind: str, names: Collection[str]) -> Source:
    down, both = f"{block}ffn_down_exps.{kind}", f"{block}ffn_gate_up_exps.{kind}"
    halves = (f"{block}ffn_gate_exps.{kind}", f"{block}ffn_up_exps.{kind}")
    if architecture == "gpt-oss":
        if kind == "bias":
            return Source((down,), _single) if matrix == "down" else Source(halves, _interleave_rows)
        if matrix == "down":
            return Source((down,), lambda tensors: tensors[0].mT)
        return Source(halves, lambda tensors: _interleave_rows(tensors).mT)
    if matrix == "down" or both in names:
        return Source((down if matrix == "down" else both,), _single)
    return Source(halves, lambda tensors: torch.cat(tensors, dim=1))


def _single(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _interleave_rows(tensors: list[Tensor]) -> Tensor:
    """Alternating rows of gate_proj and up_proj: two [experts, rows, ...] to [experts, 2 * rows, ...]."""
    return torch.stack(tensors, dim=2).flatten(1, 2)


def _join_kv_b(tensors: list[Tensor]) -> Tensor:
    """kv_b_proj [heads * (key_dim + value_dim), rank] from keys [heads, rank, key_dim] and values [heads, value_dim, rank]."""
    keys, values = tensors
    return torch.cat([keys.mT, values], dim=1).flatten(0, 1)


def _deinterleave(tensors: list[Tensor], heads: int) -> Tensor:
    """Reorder the rows (or entries) of each head from x0 y0 x1 y1 ... to x0 x1 ... y0 y1 ..."""
    (tensor,) = tensors
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
