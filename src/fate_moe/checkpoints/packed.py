"""INT4 and INT8 weights of GPTQ, AWQ and compressed-tensors: unpacks their words of codes.

All three define ``w = scale * (q - zero)`` in groups along the input dimension. They differ in how they pack the codes:

- GPTQ: ``qweight`` I32 [in / n, out], n = 32 / bits codes in a word, low bits first, along the *input*; ``qzeros`` I32
  [groups, out / n], the zero minus one (the zero itself in checkpoint_format gptq_v2); ``scales`` [groups, out]; ``g_idx`` [in],
  the group of each input channel (in order unless quantized with desc_act).
- AWQ (gemm): ``qweight`` I32 [in, out / 8], along the *output*, in the order 0 2 4 6 1 3 5 7; ``qzeros`` likewise; ``scales`` as
  in GPTQ.
- compressed-tensors (pack-quantized): ``weight_packed`` I32 [out, in / n]; ``weight_scale`` [out, groups]; ``weight_zero_point``
  I32 [out / n, groups] or absent (symmetric: the zero is the middle code); ``weight_shape``; ``weight_g_idx`` if
  quantized in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PACKED_METHODS", "Packed", "PackedWeight", "find_packed"]

PACKED_METHODS = ("gptq", "awq", "compressed-tensors")

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# By method: the tensor that marks a packed weight, and all tensors that belong to it (last parts of their names).
_LEAVES = {
    "gptq": ("qweight", ("qweight", "qzeros", "scales", "g_idx")),
    "awq": ("qweight", ("qweight", "qzeros", "scales")),
    "compressed-tensors": ("weight_packed", ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")),
}
# Of these parts, those that hold codes in words of 32 bits.
_WORDS = {"qweight", "qzeros", "weight_packed", "weight_zero_point"}


@dataclass(frozen=True)
class Packed:
    """A quantized weight: ``codes`` uint8 [out, in], ``scale`` and ``zero`` fp32 [out, in], w = scale * (codes - zero)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, fp32 [out, in]."""
        return self.scale * (self.codes - self.zero)


@dataclass(frozen=True)
class PackedWeight:
    """One packed matrix of a checkpoint. ``parts`` are the checkpoint's tensor names, by the last part of the name."""

    method: str
    bits: int
    zero_offset: int
    parts: dict[str, str]

    @property
    def scale_name(self) -> str:
        """The name of the scales in the checkpoint."""
        return self.parts["weight_scale" if self.method == "compressed-tensors" else "scales"]

    def check(self, shape_of: Callable[[str], tuple[int, ...]], dtype_of: Callable[[str], str | None], group_size: int) -> None:
        """Raises ValueError where headers alone show that the parts do not match.

        ``group_size`` is the configuration's (0: unknown).
        """
        needed = ("weight_packed", "weight_scale") if self.method == "compressed-tensors" else ("qweight", "qzeros", "scales")
        if lacking := [leaf for leaf in needed if leaf not in self.parts]:
            raise ValueError(f"it has no {' and no '.join(lacking)}")
        shapes = {leaf: shape_of(name) for leaf, name in self.parts.items()}
        dtypes = {leaf: dtype_of(name) for leaf, name in self.parts.items()}
        if wrong := [leaf for leaf in _WORDS & shapes.keys() if len(shapes[leaf]) != 2 or dtypes[leaf] != "I32"]:
            raise ValueError(f"{wrong[0]} is {dtypes[wrong[0]]} {shapes[wrong[0]]} where I32 words in two dimensions are expected")
        rows, cols = self.shape(shape_of)
        per_word = 32 // self.bits
        scale_leaf = self.scale_name.rpartition(".")[2]
        scale = shapes[scale_leaf]
        if dtypes[scale_leaf] not in ("BF16", "F16", "F32") or len(scale) != 2:
            raise ValueError(f"{scale_leaf} is {dtypes[scale_leaf]} {scale} where floating numbers in two dimensions are expected")
        groups = scale[1] if self.method == "compressed-tensors" else scale[0]
        words = -(-rows // per_word)
        wanted = {
            "scales": (groups, rows),
            "qzeros": (groups, words),
            "weight_scale": (rows, groups),
            "weight_zero_point": (words, groups),
            "g_idx": (cols,),
            "weight_g_idx": (cols,),
        }
        for leaf, shape in wanted.items():
            if leaf in shapes and shapes[leaf] != shape:
                raise ValueError(f"{leaf} has shape {shapes[leaf]} where codes for {rows} x {cols} weights need {shape}")
        if group_size > 0 and groups != -(-cols // group_size):
            raise ValueError(f"{groups} groups of scales for {cols} inputs, and config.json says group_size {group_size}")

    def shape(self, shape_of: Callable[[str], tuple[int, ...]]) -> tuple[int, int]:
        """[out, in], from the shapes of the parts."""
        per_word = 32 // self.bits
        if self.method == "compressed-tensors":
            rows, words = shape_of(self.parts["weight_packed"])
            return rows, words * per_word
        first, second = shape_of(self.parts["qweight"])
        return (second, first * per_word) if self.method == "gptq" else (second * per_word, first)

    def unpack(self, read: Callable[[str], Tensor]) -> Packed:
        """Unpack the matrix; ``read`` returns a tensor of the checkpoint. Raises ValueError if the parts do not match."""
        part = {leaf: read(name) for leaf, name in self.parts.items()}
        if self.method == "compressed-tensors":
            codes = _unpack(part["weight_packed"], self.bits)
            codes = codes[:, : int(part["weight_shape"][1])] if "weight_shape" in part else codes
            scale = part["weight_scale"].float()
            middle = 1 << (self.bits - 1)
            zero = torch.full_like(scale, middle)
            if "weight_zero_point" in part:
                zero = _unpack(part["weight_zero_point"].T.contiguous(), self.bits).T[: len(scale)].float()
        else:
            order = _AWQ_ORDER if self.method == "awq" else None
            along_input = part["qweight"].T.contiguous() if self.method == "gptq" else part["qweight"]
            codes = _unpack(along_input, self.bits, order)
            codes = codes if self.method == "gptq" else codes.T
            scale = part["scales"].float().T
            zero = (_unpack(part["qzeros"], self.bits, order).float() + self.zero_offset).T
        group_index = part.get("g_idx", part.get("weight_g_idx"))
        cols, groups = codes.shape[1], scale.shape[1]
        if group_index is None:
            if cols % groups:
                raise ValueError(f"{groups} groups for {cols} input channels")
            group_index = torch.arange(cols) // (cols // groups)
        if scale.shape != zero.shape or len(scale) != len(codes) or len(group_index) != cols or int(group_index.max()) >= groups:
            raise ValueError(f"codes {tuple(codes.shape)}, scales {tuple(scale.shape)} and zeros {tuple(zero.shape)}")
        group_index = group_index.long()
        return Packed(codes.contiguous(), scale[:, group_index], zero[:, group_index])


def find_packed(names: Iterable[str], quantization: dict[str, Any]) -> dict[str, PackedWeight]:
    """The packed weights among a checkpoint's tensor ``names``, by the name of the plain weight ("...gate_proj.weight").

    ``quantization`` is config.json's ``quantization_config``. Raises ValueError for a variant that is not supported.
    """
    method = quantization.get("quant_method")
    if method not in PACKED_METHODS:
        return {}
    bits = _code_bits(method, quantization)
    zero_offset = int(method == "gptq" and quantization.get("checkpoint_format", "gptq") != "gptq_v2")
    leaf, leaves = _LEAVES[method]
    known = set(names)
    weights = {}
    for name in known:
        stem, _, last = name.rpartition(".")
        if last == leaf:
            parts = {part: f"{stem}.{part}" for part in leaves if f"{stem}.{part}" in known}
            weights[f"{stem}.weight"] = PackedWeight(method, bits, zero_offset, parts)
    return weights


def _code_bits(method: str, quantization: dict[str, Any]) -> int:
    if method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        schemes = [(group.get("weights") or {}) for group in groups.values()]
        if quantization.get("format") != "pack-quantized" or len({scheme.get("num_bits") for scheme in schemes}) != 1:
            raise ValueError(
                f"compressed-tensors format {quantization.get('format')!r} (only pack-quantized with a single width is supported)"
            )
        bits = schemes[0]["num_bits"]
    else:
        bits = quantization.get("bits")
        if method == "awq" and str(quantization.get("version", "gemm")).lower() != "gemm":
            raise ValueError(f"AWQ version {quantization['version']!r} (only gemm is supported)")
    if bits not in ((4,) if method == "awq" else (4, 8)):
        raise ValueError(f"{method} with {bits!r} bits")
    return int(bits)


def _unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes uint8 [R, C * 32 / bits] of ``words`` I32 [R, C]. The code at bit ``bits * i`` is column ``order[i]`` of its word."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).to(torch.uint8)  # [R, C, per word]
    if order is not None:
        codes = codes[..., torch.tensor(order).argsort()]
    return codes.flatten(1)
