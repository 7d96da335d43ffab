"""Half-quadratic quantization: scales and zeros that fit most weights of a group instead of its extremes.

After Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the residual is split into a part
that a robust penalty explains (outliers) and the rest, and the two are solved in turn while the penalty hardens. This
implementation differs in three ways, each of which lowers the weight error or the cost on trained experts:

- scale *and* zero are fitted, in closed form;
- residuals are in steps, so that the penalty means the same in every group and the iteration can leave the nearest local optimum;
- the penalty is p = 1, whose proximal step is a clamp; p = 0.7 gains little and takes a power of every weight in every iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fate_moe.quant.groups import FP16_MAX, grouped_columns, minmax_grid

__all__ = ["hqq"]

# Found on trained experts: eight bits converge after five iterations, four bits gain a little until the last.
ITERATIONS, ITERATIONS_OF_8_BITS = 15, 5
# Residuals beyond 1/BETA steps are outliers in the first iteration; the threshold is divided by GROWTH in each later one.
BETA, GROWTH = 3.0, 1.05
# Weights at a time; with its temporaries this stays in a core's cache.
_CHUNK = 1 << 17


def hqq(weights: Tensor, bits: int, group_size: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See Solver. In no group is the (weighted) squared error above that of ``minmax``, up to fp32 rounding."""
    rows, cols = weights.shape
    groups = -(-cols // group_size)
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scale, zero = (torch.empty(rows, groups, dtype=torch.float16) for _ in range(2))
    importance = torch.ones(cols) if importance is None else importance.float()
    # Missing columns have no importance.
    importance = torch.nn.functional.pad(importance, (0, groups * group_size - cols)).view(1, groups, group_size)
    step = max(1, _CHUNK // (groups * group_size))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        q, s, z = _solve(grouped_columns(weights[chunk], group_size), bits, importance)
        codes[chunk], scale[chunk], zero[chunk] = q.flatten(1)[:, :cols], s, z
    return codes, scale, zero


def _solve(x: Tensor, bits: int, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes fp32 [R, G, group_size], scale and zero fp16 [R, G] of weights ``x`` fp32 [R, G, group_size].

    ``importance`` is fp32 [1, G, group_size].
    """
    levels = (1 << bits) - 1
    scale, zero = minmax_grid(x, bits)
    total = importance.sum(2).clamp_min(torch.finfo(torch.float32).tiny)
    best, best_scale, best_zero = None, scale, zero
    threshold = 1 / BETA
    for _ in range(1 + (ITERATIONS if bits < 8 else ITERATIONS_OF_8_BITS)):
        step, shift = scale.float(), zero.float()
        inverse = torch.where(step > 0, 1 / step, 0.0)
        q = torch.addcmul((shift * inverse).unsqueeze(2), x, inverse.unsqueeze(2))  # in steps, before rounding
        rounded = q.round().clamp_(0, levels)
        residual = q.sub_(rounded)
        weighted = residual * importance
        error = torch.linalg.vecdot(weighted, residual) * step.square()
        if best is None:
            best = error
        else:
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        # Refit scale and zero to the parts of the residuals that are not outliers, by least squares over the group.
        inlier = residual.clamp_(-threshold, threshold)
        threshold /= GROWTH
        weighted = rounded * importance
        mean = weighted.sum(2) / total
        mean_inlier = (inlier * importance).sum(2) / total
        variance = torch.linalg.vecdot(weighted, rounded) - total * mean.square()
        slope = (torch.linalg.vecdot(weighted, inlier) - total * mean * mean_inlier) / variance
        slope = torch.where(variance > 1e-3 * total, slope, 0.0)  # all codes equal: nothing to fit
        zero = (shift + step * (slope * mean - mean_inlier)).clamp_(-FP16_MAX, FP16_MAX).half()
        scale = (step * (1 + slope)).clamp_(0, FP16_MAX).half()
    step, shift = best_scale.float().unsqueeze(2), best_zero.float().unsqueeze(2)
    codes = torch.where(step > 0, (x + shift) / step, 0.0).round_().clamp_(0, levels)
    return codes, best_scale, best_zero
