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

from fate_moe.adapter.config_rules import EXPERT_COUNTS
from fate_moe.checkpoints.files import some
from fate_moe.checkpoints.gguf_rope import TABLES
from fate_moe.errors import CheckpointError, ConfigError

__all__ = ["Source", "check_blocks", "find_sources", "why_unread"]

_ATTENTION = re.compile(r"\.attn_([qkv])\.(weight|bias)$")
_BLOCK = re.compile(r"^blk\.(\d+)\.")

# Architectures whose query and key rows llama.cpp's converter interleaves for its rotary positions.
_INTERLEAVED = ("llama", "granitemoe")
# Architectures whose routers may lack the bias that transformers' model always has; without it llama.cpp adds nothing.
_BIAS_IS_OPTIONAL = ("deepseek2", "dots1", "ernie4_5-moe")
# What a file may hold besides the model's parameters, and why it is not read.
_UNREAD = (
    (re.compile(r"^(v|mm|a|resampler)\."), "sees or hears, and only text is read"),
    (re.compile(r"\.attn_rot_embd\.weight$"), "rotary frequencies, which are computed from the metadata"),
    (re.compile(r"\.attn_(k|v)_b\.weight$"), "the same weights as attn_kv_b, which is read"),
)
_ONES = "a rotary table of ones, which changes nothing"
_FURTHER = "predicts further tokens (MTP), which is not used"


@dataclass(frozen=True)
class Source:
    """``parts`` are tensors of the file (experts: [experts, ...], or [1, ...] for one); ``join`` makes the parameter from them.

    ``num_experts``, if not 0: ``parts`` are single experts' tensors, as in files of 2023, and ``join`` takes stacks of that many.
    """

    parts: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    num_experts: int = 0

    def make(self, read: Callable[[str, int | None], Tensor], index: int | None = None) -> Tensor:
        """The parameter, or its entry ``index`` as [1, ...]. ``read(part, i)`` returns a part, or entry i of it as [1, ...]."""
        if not self.num_experts:
            return self.join([read(part, index) for part in self.parts])
        chosen = range(self.num_experts) if index is None else (index,)
        firsts = range(0, len(self.parts), self.num_experts)
        return self.join([torch.stack([read(self.parts[first + i], None) for i in chosen]) for first in firsts])


def find_sources(model: Any, architecture: str, names: Collection[str]) -> dict[str, Source]:
    """The source of each parameter (or persistent buffer) of ``model`` that the file's tensors ``names`` make.

    Raises CheckpointError naming the tensors that are missing, ConfigError if the gguf package does not know the architecture.
    """
    import gguf

    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise ConfigError(f"the installed gguf package does not know {architecture!r}; pip install -U 'fate-moe[gguf]'")
    mapped = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied: dict[str, str] = model.all_tied_weights_keys
    sources: dict[str, Source] = {}
    missing: list[str] = []
    for name in model.state_dict():
        source = _source(name, architecture, model.config, mapped, names)
        lacking = [part for part in source.parts if part not in names] if source is not None else [name]
        if source is not None and not lacking:
            sources[name] = source
        elif name not in tied:
            missing += lacking
    if missing:
        used = {part for source in sources.values() for part in source.parts}
        others = [name for name in names if name not in used and _BLOCK.match(name)]
        instead = f" (it has {some(others)} instead)" if others else ""
        raise CheckpointError(
            f"it lacks {some(missing)}{instead}, which its metadata says this {architecture} model has; download all files again"
        )
    return sources


def check_blocks(names: Collection[str], num_layers: int, num_blocks: int) -> None:
    """Raises CheckpointError unless the file has tensors of all of ``num_layers`` layers, and of none beyond ``num_blocks``.

    Blocks that predict further tokens may stand behind the layers, named in the metadata or not.
    """
    present = {int(inside[1]) for name in names if (inside := _BLOCK.match(name))}
    further = {int(inside[1]) for name in names if (inside := _BLOCK.match(name)) and ".nextn." in name}
    absent = next(number for number in range(len(present) + 1) if number not in present)
    if absent < num_layers:
        raise CheckpointError(
            f"its metadata counts {num_layers} layers (block_count), but it has no tensors of layer {absent}; "
            "download all its files again"
        )
    if beyond := sorted(number for number in present - further if number >= num_layers):
        raise CheckpointError(
            f"it has tensors of layer {beyond[0]}, but its metadata counts {num_layers} layers"
            f"{f' and {num_blocks - num_layers} that predict further tokens' if num_blocks > num_layers else ''} "
            "(block_count, nextn_predict_layers); download or convert it again"
        )


def why_unread(name: str, num_layers: int, is_ones: Callable[[str], bool]) -> str | None:
    """Why the tensor ``name``, which makes no parameter, need not be read; None if it must not be left out."""
    if (inside := _BLOCK.match(name)) and int(inside[1]) >= num_layers:
        return _FURTHER
    if name in TABLES and is_ones(name):
        return _ONES
    return next((reason for pattern, reason in _UNREAD if pattern.search(name)), None)


def _source(name: str, architecture: str, config: Any, mapped: Any, names: Collection[str]) -> Source | None:
    inside = re.search(r"layers\.(\d+)\.(.*)", name)
    block, rest = (f"blk.{inside[1]}.", inside[2]) if inside else ("", name)
    if matched := re.search(r"\.experts\.(gate_up|down)_proj(_bias)?$", name):
        if f"{block}ffn_down.0.weight" in names:
            return _lone_experts(block, matched[1], config)
        return _expert_source(block, architecture, matched[1], "bias" if matched[2] else "weight", names)
    if rest.endswith("e_score_correction_bias"):
        part = f"{block}exp_probs_b.bias"
        if part not in names and architecture in _BIAS_IS_OPTIONAL:
            return Source((), partial(_no_bias, count=_num_experts(config)))
        return Source((part,), _single)
    if rest.endswith("shared_mlp.input_linear.weight"):
        return Source((f"{block}ffn_gate_shexp.weight", f"{block}ffn_up_shexp.weight"), torch.cat)
    if rest.endswith("block_sparse_moe.router.weight"):
        return Source((f"{block}ffn_gate_inp.weight",), _single)
    if rest.endswith("kv_b_proj.weight") and f"{block}attn_kv_b.weight" not in names:
        return Source((f"{block}attn_k_b.weight", f"{block}attn_v_b.weight"), _join_kv_b)
    part = mapped.get_name(name, try_suffixes=(".weight", ".bias"))
    if part is None:
        return None
    part = part if part in names or part.endswith((".weight", ".bias")) else f"{part}.weight"  # gpt-oss's sinks have no suffix
    if (attention := _ATTENTION.search(part)) is None:
        return Source((part,), _single)
    matrix, kind = attention.groups()
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    is_interleaved = architecture in _INTERLEAVED and matrix != "v"
    join = partial(_deinterleave, heads=heads[matrix]) if is_interleaved else _single
    if part not in names and (joined := f"{block}attn_qkv.{kind}") in names:  # the converter's --fuse-qkv
        return Source((joined,), lambda tensors: join([_part_of_qkv(tensors, matrix, heads)]))
    return Source((part,), join)


def _lone_experts(block: str, matrix: str, config: Any) -> Source:
    """One tensor an expert, as llama.cpp wrote Mixtral in 2023 and early 2024."""
    kinds, count = ("gate", "up") if matrix == "gate_up" else ("down",), _num_experts(config)
    parts = tuple(f"{block}ffn_{kind}.{expert}.weight" for kind in kinds for expert in range(count))
    return Source(parts, _join_halves, count)


def _num_experts(config: Any) -> int:
    return int(next(value for name in EXPERT_COUNTS if (value := getattr(config, name, None))))


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
    return Source(halves, _join_halves)


def _part_of_qkv(tensors: list[Tensor], matrix: str, heads: dict[str, int]) -> Tensor:
    """The rows of ``matrix`` (q, k or v) in a fused [q; k; v]. All heads have the same number of rows."""
    (tensor,) = tensors
    sizes = [tensor.shape[0] // sum(heads.values()) * count for count in heads.values()]
    return torch.split(tensor, sizes)["qkv".index(matrix)]


def _join_halves(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors, dim=1)


def _no_bias(tensors: list[Tensor], count: int) -> Tensor:
    return torch.zeros(count)


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
