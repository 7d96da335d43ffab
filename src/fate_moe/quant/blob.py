"""Encodes an expert's tensors as the bytes of its blob, and views a blob's bytes as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fate_moe.core import BlobLayout
from fate_moe.quant.compensate import compensate
from fate_moe.quant.dtypes import TORCH_DTYPES
from fate_moe.quant.groups import grouped_columns
from fate_moe.quant.planes import pack
from fate_moe.quant.solver import Solver, minmax

__all__ = ["QuantizedMatrix", "encode", "exact_codes", "views"]


class QuantizedMatrix(NamedTuple):
    """A matrix that the checkpoint already quantized: codes uint8, scale and zero, all [out, in], w = scale * (codes - zero)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def exact_codes(layout: BlobLayout, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor] | None:
    """``matrix`` in the form that a solver returns, exact except for rounding ``scale * zero`` to fp16; None if that is impossible.

    It is impossible if a group of the layout has several scales, the codes have more bits, or fp16 cannot represent a scale.
    """
    size, bits = layout.group_size, sum(layout.plane_widths)
    if matrix.codes.numel() and int(matrix.codes.max()) >> bits:
        return None
    scale, zero = (grouped_columns(tensor.float(), size) for tensor in (matrix.scale, matrix.zero))
    if not all(torch.equal(tensor, tensor[..., :1].expand_as(tensor)) for tensor in (scale, zero)):
        return None
    step, shift = scale[..., 0].half(), (scale[..., 0] * zero[..., 0]).half()
    if not torch.equal(step.float(), scale[..., 0]) or not bool(shift.isfinite().all()):
        return None
    return matrix.codes, step, shift


def encode(
    layout: BlobLayout,
    tensors: Mapping[str, Tensor],
    solver: Solver = minmax,
    moments: Mapping[str, Tensor] | None = None,
    quantized: Mapping[str, QuantizedMatrix] | None = None,
) -> bytearray:
    """The blob (``layout.length`` bytes, gaps zero) of an expert's ``tensors``: matrices [out, in] and biases [out] by name.

    ``moments`` fp32 [in, in] by matrix are the second moments of its inputs; scales, zeros and codes are then chosen for those
    inputs (see ``compensate``). Without them all inputs have the same importance. Matrices in ``quantized`` keep their codes if the
    layout can hold them (see ``exact_codes``). Every tensor must be a part of the layout or be made into parts (else KeyError).
    """
    blob = bytearray(layout.length)
    parts = views(layout, torch.frombuffer(blob, dtype=torch.uint8))
    for name, tensor in tensors.items():
        if name in parts:
            parts[name].copy_(tensor)
            continue
        exact = exact_codes(layout, quantized[name]) if quantized and name in quantized else None
        codes, scale, zero = exact or _solve(layout, tensor.float(), solver, moments.get(name) if moments else None)
        parts[f"{name}.scale"].copy_(scale)
        parts[f"{name}.zero"].copy_(zero)
        for i, plane in enumerate(pack(codes, layout.group_size, layout.plane_widths)):
            parts[f"{name}.plane{i}"].copy_(plane)
    return blob


def _solve(layout: BlobLayout, weights: Tensor, solver: Solver, moments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    bits, size = sum(layout.plane_widths), layout.group_size
    codes, scale, zero = solver(weights, bits, size, None if moments is None else moments.diagonal())
    return codes if moments is None else compensate(weights, scale, zero, layout.plane_widths, size, moments), scale, zero


def views(layout: BlobLayout, buffer: Tensor) -> dict[str, Tensor]:
    """Every part of a blob by name, without copies: ``buffer`` is uint8 of at least the blob's length, 64-byte aligned."""
    parts = {}
    for part in layout.parts:
        dtype = TORCH_DTYPES[part.dtype]
        length = math.prod(part.shape) * dtype.itemsize
        parts[part.name] = buffer[part.offset : part.offset + length].view(dtype).view(part.shape)
    return parts
