"""Shared by all solvers: weights in groups along the input dimension, and the grid from a group's minimum to its maximum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["FP16_MAX", "grouped_columns", "minmax_grid"]

FP16_MAX = torch.finfo(torch.float16).max


def grouped_columns(weights: Tensor, group_size: int) -> Tensor:
    """[R, G, group_size] of ``weights`` [R, C], G = ceil(C / group_size); missing columns repeat the last one."""
    rows, cols = weights.shape
    groups = -(-cols // group_size)
    return pad(weights.unsqueeze(0), (0, groups * group_size - cols), mode="replicate").view(rows, groups, group_size)


def minmax_grid(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero fp16 [R, G] that spread the codes from the minimum to the maximum of ``grouped`` [R, G, group_size].

    Both are rounded *outwards*, so that the codes still span the group. Groups beyond fp16's range (65504) are clamped to it.
    """
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    zero = _round_up(-low)
    return _round_up((high + zero.float()) / ((1 << bits) - 1)), zero


def _round_up(values: Tensor) -> Tensor:
    """The smallest fp16 number that is not below ``values`` (fp32), within fp16's range."""
    values = values.clamp(-FP16_MAX, FP16_MAX)
    nearest = values.half()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).clamp(max=FP16_MAX)
    return torch.where(nearest.float() < values, above, nearest)
