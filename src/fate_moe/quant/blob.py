"""One expert's tensors to the bytes of its blob, and a blob's bytes as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fate_moe.core import BlobLayout
from fate_moe.quant.dtypes import TORCH_DTYPES
from fate_moe.quant.planes import pack
from fate_moe.quant.solver import Solver, minmax

__all__ = ["encode", "views"]


def encode(
    layout: BlobLayout,
    tensors: Mapping[str, Tensor],
    solver: Solver = minmax,
    importance: Mapping[str, Tensor] | None = None,
) -> bytearray:
    """The blob (``layout.length`` bytes, gaps zero) of an expert's ``tensors``: matrices [out, in] and biases [out] by name.

    ``importance`` [in] by matrix is handed to the solver; without it all channels matter alike. Every part of the layout must be
    among the tensors or made from one of them (KeyError otherwise).
    """
    blob = bytearray(layout.length)
    parts = views(layout, torch.frombuffer(blob, dtype=torch.uint8))
    for name, tensor in tensors.items():
        if name in parts:
            parts[name].copy_(tensor)
            continue
        matter = importance.get(name) if importance else None
        codes, scale, zero = solver(tensor.float(), sum(layout.plane_widths), layout.group_size, matter)
        parts[f"{name}.scale"].copy_(scale)
        parts[f"{name}.zero"].copy_(zero)
        for i, plane in enumerate(pack(codes, layout.group_size, layout.plane_widths)):
            parts[f"{name}.plane{i}"].copy_(plane)
    return blob


def views(layout: BlobLayout, buffer: Tensor) -> dict[str, Tensor]:
    """Every part of a blob by name, without copies: ``buffer`` is uint8 of at least the blob's length, 64-byte aligned."""
    parts = {}
    for part in layout.parts:
        dtype = TORCH_DTYPES[part.dtype]
        length = math.prod(part.shape) * dtype.itemsize
        parts[part.name] = buffer[part.offset : part.offset + length].view(dtype).view(part.shape)
    return parts
