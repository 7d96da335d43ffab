"""Which experts a token takes, and their weights, on the GPU. Twin: ``kernels/routing.py``."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["choose", "choose_kernel"]


@triton.jit
def choose(
    logits, correction, kind: tl.constexpr, scale, floor, spread, num_experts: tl.constexpr, top_k: tl.constexpr,
    SCORES: tl.constexpr, CORRECTED: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr,
    NORMALIZE: tl.constexpr, ROUNDS: tl.constexpr, E: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """The ``top_k`` experts that a router chooses int32 [R] (-1 beyond), their weights [R], and all scores [E].

    What the parameters mean says ``plain_layer.Router``; ROUNDS: logits are rounded to ``kind`` first. Ties go to the lowest index.
    """
    expert = tl.arange(0, E)
    known = expert < num_experts
    r = tl.arange(0, R)
    logit = tl.load(logits + expert, mask=known, other=float("-inf"))
    if ROUNDS:
        logit = logit.to(kind).to(tl.float32)
    choice = tl.zeros((R,), tl.int32) - 1
    weight = tl.zeros((R,), tl.float32)
    if SCORES == "sigmoid":
        p = tl.sigmoid(logit)
    else:
        p = tl.exp(logit - tl.max(logit, axis=0))
        p = p / tl.sum(p, axis=0)
    value = p if SCORES != "sparse mixer" else logit
    if CORRECTED:
        value += tl.load(correction + expert, mask=known, other=0.0).to(tl.float32)
    value = tl.where(known, value, float("-inf"))
    if GROUPS > TOP_GROUPS:
        group = expert // (num_experts // GROUPS)
        sums = tl.zeros((E,), tl.float32)
        for g in tl.static_range(GROUPS):
            rest = tl.where(group == g, value, float("-inf"))
            total = 0.0
            for _ in tl.static_range(GROUP_BEST):
                best = tl.max(rest, axis=0)
                rest = tl.where(expert == tl.min(tl.where(rest == best, expert, E), axis=0), float("-inf"), rest)
                total += best
            sums = tl.where(group == g, total, sums)
        sums = tl.where(known, sums, float("-inf"))
        allowed = expert < 0
        for _ in tl.static_range(TOP_GROUPS):
            first = tl.min(tl.where(sums == tl.max(sums, axis=0), group, GROUPS), axis=0)
            allowed = allowed | (group == first)
            sums = tl.where(group == first, float("-inf"), sums)
        value = tl.where(allowed, value, float("-inf"))
    for i in tl.static_range(top_k):
        best = tl.max(value, axis=0)
        which = tl.min(tl.where(value == best, expert, E), axis=0)
        if SCORES == "sparse mixer":
            far = (best - logit) / tl.maximum(tl.abs(logit), best) > spread
            near = tl.where(far, float("-inf"), value)
            given = 1.0 / tl.sum(tl.exp(near - best), axis=0)
        else:
            given = tl.sum(tl.where(expert == which, p, 0.0), axis=0)
        choice = tl.where(r == i, which, choice)
        weight = tl.where(r == i, given, weight)
        value = tl.where(expert == which, float("-inf"), value)
    if NORMALIZE:
        weight = weight / tl.maximum(tl.sum(weight, axis=0), floor)
    return choice, weight * scale, p


@triton.jit
def choose_kernel(
    logits, correction, live, x, choices, weights, chances, stride, scale, floor, spread, num_experts: tl.constexpr,
    top_k: tl.constexpr, SCORES: tl.constexpr, CORRECTED: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr, NORMALIZE: tl.constexpr, ROUNDS: tl.constexpr, E: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """``choose`` for several tokens: ``choices`` int32 and ``weights`` [tokens, top_k], ``chances`` fp32 [tokens, num_experts].
    Grid (tokens).

    Logits of a token begin every ``stride``; ``x`` has the router input's dtype. The first ``live`` int32 [1] tokens are there;
    others choose no expert.
    """
    token = tl.program_id(0)
    r = tl.arange(0, R)
    expert = tl.arange(0, E)
    choice, weight, p = choose(
        logits + token * stride, correction, x.dtype.element_ty, scale, floor, spread, num_experts, top_k, SCORES, CORRECTED,
        GROUPS, TOP_GROUPS, GROUP_BEST, NORMALIZE, ROUNDS, E, R,
    )  # fmt: skip
    there = token < tl.load(live)
    tl.store(choices + token * top_k + r, tl.where(there, choice, -1), mask=r < top_k)
    tl.store(weights + token * top_k + r, tl.where(there, weight, 0.0).to(weights.dtype.element_ty), mask=r < top_k)
    tl.store(chances + token * num_experts + expert, tl.where(there, p, 0.0), mask=expert < num_experts)
