"""Which experts a token takes and with what weights, to the bit. In C++: ``csrc/routers.cpp``."""

from __future__ import annotations

import torch

from fate_moe.kernels.elementary import bf16, sigmoid, softmax
from fate_moe.kernels.plain_layer import Router

__all__ = ["SCORES", "route"]

SCORES = ("softmax", "sigmoid", "sparse mixer")  # the extension's enumeration


def route(router: Router, logits: torch.Tensor, correction: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of fp32 ``logits`` [T, experts] the chosen experts [T, top_k] int64, best first, and their weights fp32 [T, top_k].

    Experts are chosen by score + ``correction`` [experts], and weighed by the score alone. Of equal ones the lowest index is taken,
    NaN counts as -infinity. A group's value is the sum of its ``group_best`` largest, from 0, the largest first. ``normalize``:
    divided by the sum of the chosen, added in routing order from 0 (at least ``floor``). Then times ``scale``.
    What ``rounds_logits`` and ``rounds_weights`` round becomes bf16.

    "sparse mixer": the expert with the largest logit m; its weight is its ``softmax`` among those with
    (m - s) / max(|s|, m) at most ``spread``. Then the same without it.
    """
    logits = bf16(logits) if router.rounds_logits else logits
    if router.scores == "sparse mixer":
        chosen, weights = _mixed_sparsely(router, logits)
    else:
        scores = softmax(logits) if router.scores == "softmax" else sigmoid(logits)
        values = scores + (0.0 if correction is None else correction.float())
        chosen = _largest(values, _allowed(router, values), router.top_k)
        weights = scores.gather(1, chosen)
    if router.normalize:
        total = torch.zeros(len(logits), 1)
        for j in range(router.top_k):
            total = total + weights[:, j : j + 1]
        weights = weights / torch.where(total < router.floor, router.floor, total)
    weights = weights * router.scale
    return chosen, bf16(weights) if router.rounds_weights else weights


def _largest(values: torch.Tensor, allowed: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.where(values.isnan(), -torch.inf, values).sort(dim=-1, descending=True, stable=True)[1]
    refused = (~allowed).gather(1, order).int().sort(dim=-1, stable=True)[1]
    return order.gather(1, refused)[:, :count]


def _allowed(router: Router, values: torch.Tensor) -> torch.Tensor:
    """[T, experts]: those of the best groups."""
    if router.groups <= router.top_groups:
        return torch.ones_like(values, dtype=torch.bool)
    numbers = torch.where(values.isnan(), -torch.inf, values).view(len(values), router.groups, -1)
    best = numbers.sort(dim=-1, descending=True)[0]
    sums = torch.zeros(numbers.shape[:2])
    for j in range(router.group_best):
        sums = sums + best[:, :, j]
    groups = _largest(sums, torch.ones_like(sums, dtype=torch.bool), router.top_groups)
    good = torch.zeros_like(sums, dtype=torch.bool).scatter(1, groups, True)
    return good.unsqueeze(-1).expand_as(numbers).reshape(values.shape)


def _mixed_sparsely(router: Router, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    left, chosen, weights = torch.ones_like(logits, dtype=torch.bool), list[torch.Tensor](), list[torch.Tensor]()
    for _ in range(router.top_k):
        best = _largest(logits, left, 1)
        most, size = logits.gather(1, best), logits.abs()
        far = (most - logits) / torch.where(size < most, most, size) > router.spread
        near = torch.where(far | ~left, -torch.inf, logits)
        chosen.append(best)
        weights.append(softmax(near).gather(1, best))
        left = left.scatter(1, best, False)
    return torch.cat(chosen, 1), torch.cat(weights, 1)
