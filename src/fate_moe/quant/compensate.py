"""Chooses codes that minimize the error of a matrix's outputs: second-order error compensation, then coordinate descent.

1. Compensation, after Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022):
   input channels are rounded one after another, and the later channels compensate the output error of each rounding as far as the
   second moments of the inputs allow.
2. Descent, after Behdin et al., "QuantEase" (2023): each channel's codes are chosen again with all other channels fixed, so that
   early channels take later ones into account.

The descent here also minimizes the error of the longest shorter view: a code moves to the neighbouring bin if that lowers the
weighted sum of both squared errors. Scales and zeros come from a solver and are fixed, so channels can be processed in order of
their power, whatever their group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["compensate"]

# Added to the moments' diagonal, as a multiple of its mean, for inputs that the text does not contain. Chosen by the error of the
# experts' outputs on another text, for two models.
DAMPING = 0.5
# Passes of the descent, and the weight of the longest shorter view's squared error in it. Both were chosen as DAMPING was: further
# passes change little, and a larger weight costs more with all bits than it gains for the view.
DESCENTS, VIEW_WEIGHT = 2, 0.03
# Channels whose changes are applied to all later channels in one product.
_BLOCK = 64


def compensate(weights: Tensor, scale: Tensor, zero: Tensor, widths: Sequence[int], group_size: int, moments: Tensor) -> Tensor:
    """Codes uint8 [R, C] of ``weights`` fp32 [R, C] for given ``scale`` and ``zero`` fp16 [R, G], and inputs with second moments
    ``moments`` fp32 [C, C] (sum or mean of x x^T; a constant factor does not matter).

    Codes have ``sum(widths)`` bits in planes of ``widths``. With several planes, the longest shorter view omits the last one. With
    one plane and all moments zero the result is the nearest codes.
    """
    power = moments.diagonal()
    order = power.argsort(descending=True)
    ordered = moments[order][:, order]
    ordered.diagonal().add_(DAMPING * float(power.mean()) or 1.0)
    group = order // group_size
    grid = _Grid(scale.float().T[group], zero.float().T[group], (1 << sum(widths)) - 1)
    target = weights.T[order].contiguous()  # [C, R]
    codes = _round_in_turn(target, grid, ordered)
    if len(widths) > 1:
        for _ in range(DESCENTS):
            _descend(codes, target, grid, ordered, 1 << widths[-1])
    unordered = torch.empty(weights.shape, dtype=torch.uint8)
    unordered[:, order] = codes.T.to(torch.uint8)
    return unordered


class _Grid:
    """The quantization grid, the values of the codes of each channel: w = step * code - shift, all fp32 [C, R]."""

    def __init__(self, step: Tensor, shift: Tensor, levels: int) -> None:
        self.step, self.shift, self.levels = step, shift, levels
        self.inverse = torch.where(step > 0, 1 / step, 0.0)
        self.origin = shift * self.inverse  # the (fractional) code of the weight 0

    def values(self, codes: Tensor) -> Tensor:
        return codes * self.step - self.shift


def _round_in_turn(target: Tensor, grid: _Grid, moments: Tensor) -> Tensor:
    """Codes fp32 [C, R] of the weights ``target`` [C, R]; each channel's rounding error is compensated by the later channels."""
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)  # [C, C]
    factor /= factor.diagonal()[:, None].clone()
    left, codes = target.clone(), torch.empty_like(target)  # the weights with compensation added
    for start in range(0, len(target), _BLOCK):
        block = left[start : start + _BLOCK]
        stop = start + len(block)
        errors = torch.empty_like(block)
        for i, at in enumerate(range(start, stop)):
            code = torch.addcmul(grid.origin[at], block[i], grid.inverse[at]).round_().clamp_(0, grid.levels)
            codes[at] = code
            errors[i] = block[i] - torch.addcmul(-grid.shift[at], code, grid.step[at])
            block[i + 1 :].addr_(factor[at, at + 1 : stop], errors[i], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes


def _descend(codes: Tensor, target: Tensor, grid: _Grid, moments: Tensor, width: int) -> None:
    """Choose ``codes`` [C, R] again, channel by channel, for the errors of all bits and of the view that replaces each code by the
    middle of its bin of ``width`` codes."""
    views = torch.stack((codes, _middle(codes, width)), 1)  # [C, 2, R]
    # The best weight of a channel, with all others fixed, is its present weight plus this.
    pull = (target[:, None] - (views * grid.step[:, None] - grid.shift[:, None])).flatten(1)
    moments = moments / moments.diagonal()[:, None]
    pull = (moments @ pull).view_as(views)
    for start in range(0, len(codes), _BLOCK):
        block = pull[start : start + _BLOCK]
        stop = start + len(block)
        changes = torch.empty_like(block)
        for i, at in enumerate(range(start, stop)):
            best = torch.addcmul(views[at], block[i], grid.inverse[at])
            near = best[0].round().clamp_(0, grid.levels)
            middle = _middle(near, width)
            beyond = middle + (best[1] - middle).sign() * ((width + 1) / 2)  # the nearest code of the next bin
            beyond.clamp_(0, grid.levels)
            choices = torch.stack((near, middle, beyond, _middle(beyond, width))).view(2, 2, -1)
            cost = (choices - best).square_()
            cost = cost[:, 0].add_(cost[:, 1], alpha=VIEW_WEIGHT)
            chosen = torch.where(cost[1] < cost[0], choices[1], choices[0])
            torch.sub(chosen, views[at], out=changes[i]).mul_(grid.step[at])
            codes[at] = chosen[0]
            block[i + 1 :].flatten(1).addr_(moments[at + 1 : stop, at], changes[i].flatten(), alpha=-1)
        pull[stop:].flatten(1).addmm_(moments[stop:, start:stop], changes.flatten(1), alpha=-1)


def _middle(codes: Tensor, width: int) -> Tensor:
    """The middle of the bin of ``width`` codes that each of ``codes`` lies in."""
    return codes.div(width).floor_().mul_(width).add_((width - 1) / 2)
