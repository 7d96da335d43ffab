"""From weights to codes: the seam where better quantizers go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["SOLVERS", "Solver", "minmax"]

# (weights fp32 [R, C], bits, group_size) -> codes uint8 [R, C], scale fp16 [R, G], zero fp16 [R, G], with w = scale * q - zero and
# G = ceil(C / group_size). Weights are finite; scale and zero must be too.
Solver = Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor]]

_LARGEST = torch.finfo(torch.float16).max


def minmax(weights: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes spread evenly from each group's least to its greatest weight; see Solver.

    Scale and zero are rounded to fp16 *outwards*, so that the codes still span the group and no weight is off by more than half a
    scale. Groups beyond fp16's range (65504) are clamped to it.
    """
    cols = weights.shape[1]
    groups = -(-cols // group_size)
    padded = pad(weights.unsqueeze(0), (0, groups * group_size - cols), mode="replicate").squeeze(0)
    grouped = padded.view(-1, groups, group_size)  # [R, G, group_size]
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    levels = (1 << bits) - 1
    zero = _round_up(-low)
    scale = _round_up((high + zero.float()) / levels)
    step = scale.float().unsqueeze(2)
    codes = torch.where(step > 0, (grouped + zero.float().unsqueeze(2)) / step, 0.0).round_().clamp_(0, levels)
    return codes.to(torch.uint8).flatten(1)[:, :cols], scale, zero


def _round_up(values: Tensor) -> Tensor:
    """The least fp16 not below ``values`` (fp32), within fp16's range."""
    values = values.clamp(-_LARGEST, _LARGEST)
    nearest = values.half()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).clamp(max=_LARGEST)
    return torch.where(nearest.float() < values, above, nearest)


SOLVERS: dict[str, Solver] = {"minmax": minmax}
