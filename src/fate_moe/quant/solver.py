"""Solvers compute codes, scales and zeros from weights; a new quantizer implements ``Solver``."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fate_moe.quant.choices import SOLVER_NAMES
from fate_moe.quant.groups import grouped_columns, minmax_grid
from fate_moe.quant.hqq import hqq

__all__ = ["DEFAULT_SOLVER", "SOLVERS", "Solver", "minmax"]


class Solver(Protocol):
    """Weights fp32 [R, C] to codes uint8 [R, C], scale and zero fp16 [R, G], with w = scale * q - zero, G = ceil(C / group_size).

    ``importance`` [C], not negative, weights the squared error of each input channel; None: all equal. Weights are finite; scale
    and zero must be finite too.
    """

    def __call__(
        self, weights: Tensor, bits: int, group_size: int, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def minmax(weights: Tensor, bits: int, group_size: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes spread evenly from each group's minimum to its maximum; ``importance`` is ignored. See Solver.

    Scale and zero are rounded to fp16 *outwards*, so that no weight is off by more than half a scale.
    """
    grouped = grouped_columns(weights, group_size)
    scale, zero = minmax_grid(grouped, bits)
    step = scale.float().unsqueeze(2)
    codes = torch.where(step > 0, (grouped + zero.float().unsqueeze(2)) / step, 0.0).round_().clamp_(0, (1 << bits) - 1)
    return codes.to(torch.uint8).flatten(1)[:, : weights.shape[1]], scale, zero


SOLVERS: dict[str, Solver] = {"hqq": hqq, "minmax": minmax}  # the names in choices.SOLVER_NAMES
DEFAULT_SOLVER = SOLVER_NAMES[0]
