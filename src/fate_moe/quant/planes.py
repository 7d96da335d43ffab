"""Packs codes into bit planes and unpacks them: the byte layout that every kernel reads.

A code of ``sum(widths)`` bits is cut into planes from its high bits down: with widths 2+1+1, q = 4*h + 2*m + l. Each plane holds,
for one group of ``group_size`` codes, ``n = group_size * width / 8`` bytes:

- width 2, 4 or 8: element ``n*j + b`` is in byte ``b``, in the bits from ``width*j`` on, so that one shift and one mask of a whole
  register give ``n`` neighbouring elements (group 64, width 2: element 16j+b is in bits 2j..2j+1 of byte b);
- width 1: element ``e`` is bit ``e % 8`` of byte ``e // 8``, so that the plane can be loaded as a mask register.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["pack", "unpack"]


def pack(codes: Tensor, group_size: int, widths: Sequence[int]) -> list[Tensor]:
    """Planes U8 [R, G, group_size * width / 8] of ``codes`` uint8 [R, C], G = ceil(C / group_size); missing codes are 0.

    Raises ValueError for a width other than 1, 2, 4, 8 or a group that does not fill whole bytes.
    """
    _check(group_size, widths)
    rows, cols = codes.shape
    groups = -(-cols // group_size)
    codes = pad(codes, (0, groups * group_size - cols)).view(rows, groups, group_size)
    planes = []
    low = sum(widths)
    for width in widths:
        low -= width
        bits = codes >> low & (1 << width) - 1
        lanes = _to_lanes(bits, width)  # [R, G, 8 / width, n]
        shifts = torch.arange(0, 8, width, dtype=torch.uint8).unsqueeze(1)
        planes.append((lanes << shifts).sum(dim=2, dtype=torch.uint8))
    return planes


def unpack(planes: Sequence[Tensor], widths: Sequence[int], group_size: int, num_planes: int | None = None) -> Tensor:
    """Codes uint8 [R, G * group_size] from the first ``num_planes`` planes (all of them by default).

    Bits of omitted planes are zero: a truncated code is the lower edge of its bin, and the caller adds half the bin's width.
    Raises ValueError as ``pack`` does.
    """
    _check(group_size, widths)
    used = len(widths) if num_planes is None else num_planes
    rows, groups, _ = planes[0].shape
    codes = torch.zeros(rows, groups, group_size, dtype=torch.uint8, device=planes[0].device)
    low = sum(widths)
    for plane, width in zip(planes[:used], widths[:used], strict=True):
        low -= width
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device).unsqueeze(1)
        lanes = plane.unsqueeze(2) >> shifts & (1 << width) - 1  # [R, G, 8 / width, n]
        codes |= _from_lanes(lanes, width) << low
    return codes.view(rows, groups * group_size)


def _to_lanes(bits: Tensor, width: int) -> Tensor:
    """[R, G, group_size] -> [R, G, 8 / width, n]: lane j holds the codes for bits width*j of each byte."""
    rows, groups, _ = bits.shape
    return bits.view(rows, groups, -1, 8).mT if width == 1 else bits.view(rows, groups, 8 // width, -1)


def _from_lanes(lanes: Tensor, width: int) -> Tensor:
    return (lanes.mT if width == 1 else lanes).flatten(2)


def _check(group_size: int, widths: Sequence[int]) -> None:
    if not widths or any(width not in (1, 2, 4, 8) for width in widths) or sum(widths) > 8 or group_size % 8:
        raise ValueError(f"planes of {tuple(widths)} bits in groups of {group_size}: widths must be 1, 2, 4 or 8")
