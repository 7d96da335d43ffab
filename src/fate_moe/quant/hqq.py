"""Half-quadratic quantization: scales and zeros that fit the weights between a group's extremes, not the extremes.

After Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the residual is split into a part
that a robust penalty explains (outliers) and the rest, and the two are solved for in turn while the penalty hardens. Ours differs
in three ways, each measured on trained experts in 4-bit groups of 64 (relative weight error; min/max 0.0899, theirs 0.0863): scale
*and* zero are fitted, in closed form (0.0845); residuals are in steps, so that the penalty means the same in every group and the
iteration leaves the nearest local optimum (0.0833); and the penalty is p = 1, whose proximal step is a clamp (p = 0.7 ends at
0.0831 and takes a power of every weight and iteration).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fate_moe.quant.groups import LARGEST, grouped_columns, minmax_grid

__all__ = ["hqq"]

# Eight bits end near 0.0050 of the weights' norm after five (min/max 0.0053); four bits gain to the last (0.0842 after 7, 0.0836).
ITERATIONS, ITERATIONS_OF_8_BITS = 15, 5
# Residuals beyond 1/BETA steps are outliers in the first iteration; each next one has a threshold smaller by GROWTH.
BETA, GROWTH = 3.0, 1.05
# Weights at a time: with its temporaries this stays in a core's cache (a Qwen1.5-MoE expert: see docs/quality.md).
_CHUNK = 1 << 17


def hqq(weights: Tensor, bits: int, group_size: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See Solver. In no group is the (weighted) squared error above that of ``minmax``, up to fp32 rounding."""
    rows, cols = weights.shape
    groups = -(-cols // group_size)
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scale, zero = (torch.empty(rows, groups, dtype=torch.float16) for _ in range(2))
    matter = torch.ones(cols) if importance is None else importance.float()
    # Columns that do not exist weigh nothing.
    matter = torch.nn.functional.pad(matter, (0, groups * group_size - cols)).view(1, groups, group_size)
    step = max(1, _CHUNK // (groups * group_size))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        q, s, z = _solve(grouped_columns(weights[chunk], group_size), bits, matter)
        codes[chunk], scale[chunk], zero[chunk] = q.flatten(1)[:, :cols], s, z
    return codes, scale, zero


def _solve(x: Tensor, bits: int, matter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes fp32 [R, G, group_size], scale and zero fp16 [R, G] of weights ``x`` [R, G, group_size] fp32."""
    levels = (1 << bits) - 1
    scale, zero = minmax_grid(x, bits)
    total = matter.sum(2).clamp_min(torch.finfo(torch.float32).tiny)
    best, best_scale, best_zero = None, scale, zero
    threshold = 1 / BETA
    for _ in range(1 + (ITERATIONS if bits < 8 else ITERATIONS_OF_8_BITS)):
        step, shift = scale.float(), zero.float()
        inverse = torch.where(step > 0, 1 / step, 0.0)
        q = torch.addcmul((shift * inverse).unsqueeze(2), x, inverse.unsqueeze(2))  # in steps, before rounding
        rounded = q.round().clamp_(0, levels)
        residual = q.sub_(rounded)
        weighted = residual * matter
        error = torch.linalg.vecdot(weighted, residual) * step.square()
        if best is None:
            best = error
        else:
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        # The part of each residual that is no outlier is what scale and zero are refitted to: least squares over the group.
        inlier = residual.clamp_(-threshold, threshold)
        threshold /= GROWTH
        weighted = rounded * matter
        mean = weighted.sum(2) / total
        mean_inlier = (inlier * matter).sum(2) / total
        variance = torch.linalg.vecdot(weighted, rounded) - total * mean.square()
        slope = (torch.linalg.vecdot(weighted, inlier) - total * mean * mean_inlier) / variance
        slope = torch.where(variance > 1e-3 * total, slope, 0.0)  # all codes alike: nothing to fit
        zero = (shift + step * (slope * mean - mean_inlier)).clamp_(-LARGEST, LARGEST).half()
        scale = (step * (1 + slope)).clamp_(0, LARGEST).half()
    step, shift = best_scale.float().unsqueeze(2), best_zero.float().unsqueeze(2)
    codes = torch.where(step > 0, (x + shift) / step, 0.0).round_().clamp_(0, levels)
    return codes, best_scale, best_zero
