"""Codes that err where the inputs do not look: second-order error compensation, then descent from code to code.

After Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022): input channels are
rounded one after another, and what a channel's rounding does to the outputs is taken back, as far as the inputs' second moments
allow, by the channels that are still to come. Then, after Behdin et al., "QuantEase" (2023), each channel's codes are chosen again
with all others as they are, so that early channels hear of late ones too. Ours lets the longest shorter view have a say there: the
next longer code's bin is taken instead where the view gains more by it than the whole code loses. Scales and zeros are a solver's,
fixed beforehand, so that channels may go in the order of their power whatever their group.

Error of the experts' outputs on another text (experts of three layers, groups of 64), all bits / 3-bit view:

- upcycled model: no moments 0.1243 / 0.2858, compensation 0.1009 / 0.2792, two descents 0.0995 / 0.2779, the view heard with a
  weight of 0.03 0.1000 / 0.2672, of 0.1 0.1031 / 0.2511;
- embedded model: 0.1199 / 0.2551, 0.1130 / 0.2530, 0.1126 / 0.2526, 0.1129 / 0.2472, 0.1147 / 0.2419.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["compensate"]

# Of the mean of the moments' diagonal, added to all of it: what the text has not shown may still come. Error of the experts'
# outputs on another text at 0.1 / 0.5 / 1: upcycled model 0.0787 / 0.0796 / 0.0808, embedded model 0.1167 / 0.1121 / 0.1111
# (perplexity 11.858 at 0.1, 11.837 at 0.5).
DAMPING = 0.5
# Times that each channel's codes are chosen again, and what the longest shorter view's squared error counts then.
DESCENTS, VIEW_WEIGHT = 2, 0.03
# Channels whose changes are brought to all that follow at once.
_BLOCK = 64


def compensate(weights: Tensor, scale: Tensor, zero: Tensor, widths: Sequence[int], group_size: int, moments: Tensor) -> Tensor:
    """Codes uint8 [R, C] of ``weights`` fp32 [R, C] on the grid ``scale``, ``zero`` fp16 [R, G], for inputs of second moments
    ``moments`` fp32 [C, C] (sum or mean of x x^T; its measure does not matter).

    Codes have ``sum(widths)`` bits, in planes of ``widths``; where there are several, the last is what the longest shorter view
    lacks. With one plane and all moments zero these are the nearest codes.
    """
    power = moments.diagonal()
    order = power.argsort(descending=True)
    ordered = moments[order][:, order]
    ordered.diagonal().add_(DAMPING * float(power.mean()) or 1.0)
    group = order // group_size
    grid = _Grid(scale.float().T[group], zero.float().T[group], (1 << sum(widths)) - 1)
    wanted = weights.T[order].contiguous()  # [C, R]
    codes = _round_in_turn(wanted, grid, ordered)
    if len(widths) > 1:
        for _ in range(DESCENTS):
            _descend(codes, wanted, grid, ordered, 1 << widths[-1])
    made = torch.empty(weights.shape, dtype=torch.uint8)
    made[:, order] = codes.T.to(torch.uint8)
    return made


class _Grid:
    """What codes of each channel stand for: fp32 [C, R], w = step * code - shift."""

    def __init__(self, step: Tensor, shift: Tensor, levels: int) -> None:
        self.step, self.shift, self.levels = step, shift, levels
        self.inverse = torch.where(step > 0, 1 / step, 0.0)
        self.origin = shift * self.inverse  # the code of zero

    def values(self, codes: Tensor) -> Tensor:
        return codes * self.step - self.shift


def _round_in_turn(wanted: Tensor, grid: _Grid, moments: Tensor) -> Tensor:
    """Codes fp32 [C, R] of weights ``wanted``, each channel's error taken back by those after it."""
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)  # [C, C]
    factor /= factor.diagonal()[:, None].clone()
    left, codes = wanted.clone(), torch.empty_like(wanted)  # what is still to be said by each channel
    for start in range(0, len(wanted), _BLOCK):
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


def _descend(codes: Tensor, wanted: Tensor, grid: _Grid, moments: Tensor, width: int) -> None:
    """Choose ``codes`` [C, R] again, channel by channel, for the errors of all bits and of the view that takes each ``width`` codes
    for the middle of their bin."""
    views = torch.stack((codes, _middle(codes, width)), 1)  # [C, 2, R]
    # How the error would fall with each channel's weight, in its own power: a channel's best weight is its own plus this.
    pull = (wanted[:, None] - (views * grid.step[:, None] - grid.shift[:, None])).flatten(1)
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
    """Of the bin of ``width`` codes that each of ``codes`` lies in."""
    return codes.div(width).floor_().mul_(width).add_((width - 1) / 2)
