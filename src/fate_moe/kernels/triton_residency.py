"""Residency on the device: lookup, eviction, remapping and the lists of what to fetch, without the host.

Each MoE layer owns a fixed number of slots (its quota), always full. So the layer that runs and the layer that is prefetched for
touch different rows of every table, and need no lock. Tables, [layers, experts] each: ``slot_of`` int32 (-1: not resident),
``score`` fp32 (the resident expert of lowest score gives up its slot; ties go to the lowest index), ``unused`` int32 (1:
prefetched and not routed to since; 2: and its layer has not run since, so the copy may not have ended). ``counters`` int64
[layers, 5]: hits, misses, prefetched, prefetches used, and how many of the misses the host computed.

Scores: by recency, the time of the last use, and a prefetched expert counts as never used until it is routed to; by decayed
frequency, the base-2 logarithm of the sum over uses of 2^(time / half-life), which orders experts as letting all their counts
decay would (forward decay, Cormode et al., ICDE 2009); it outlives residency. By decayed probability, the same sum over all tokens,
times the root of what the router gave the expert: one that was nearly chosen again and again stays, one chosen once by chance goes.

Twin: ``tests/support/gpu_twin.py``, over the policies that run on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_host_compute import ask_experts
from fate_moe.kernels.triton_quantize import stage_token
from fate_moe.kernels.triton_router import choose

__all__ = ["logits_kernel", "prefetch_kernel", "residency_kernel", "route_kernel"]


@triton.jit
def _lowest(score, candidates, expert, E: tl.constexpr):
    """The candidate of lowest score, the lowest index among equals; E if there is none."""
    masked = tl.where(candidates, score, float("inf"))
    best = tl.min(masked, axis=0)
    return tl.min(tl.where(candidates & (masked == best), expert, E), axis=0)


@triton.jit
def _highest(score, candidates, expert, E: tl.constexpr):
    """The candidate of highest score, the lowest index among equals; E if there is none."""
    masked = tl.where(candidates, score, float("-inf"))
    return tl.min(tl.where(candidates & (masked == tl.max(masked, axis=0)), expert, E), axis=0)


@triton.jit
def _assign_slots(
    choice,
    probability,
    slots,
    pending_rows,
    wanted,
    count,
    slot_of,
    score,
    unused,
    counters,
    clock,
    layer,
    last,
    half_life,
    shares,
    questions,
    asked,
    behind,
    admit_every,
    spare,
    x,
    tokens,
    num_experts: tl.constexpr,
    num_rows: tl.constexpr,
    cols: tl.constexpr,
    FREQUENCY: tl.constexpr,
    WEIGHED: tl.constexpr,
    HOST: tl.constexpr,
    ADMITS: tl.constexpr,
    MOST: tl.constexpr,
    TOKENS: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
):
    """Move the tables of ``layer`` for ``choice`` int32 [R] (-1: no expert); see ``residency_kernel``.

    With WEIGHED every expert's use grows by the root of its ``probability`` [E], else the chosen ones' by 1.

    With HOST the host is asked for as many misses as ``shares`` int32 [num_experts + 1] says of their number, those of lowest
    score, on the router inputs ``x`` [tokens, cols] (``ask_experts``; choices of TOKENS, of which ``tokens`` are there); their
    slots stay -1, and ``pending_rows`` is 2 + their place in its answer. The others are listed. With ADMITS, where nothing else is
    copied, the one of highest score still gets a slot for the next token, if its turn (one layer of ``admit_every``) has come and
    its score is above the victim's: ``behind`` int32 [2, 2] is its pair and their number.

    Where several tokens miss more than there are slots that can be given away, the others are copied to slots from ``spare`` on,
    for this step alone.
    """
    expert = tl.arange(0, E)
    known = expert < num_experts
    at = layer * num_experts + expert
    slot = tl.load(slot_of + at, mask=known, other=-1)
    value = tl.load(score + at, mask=known, other=0.0)
    waiting = tl.load(unused + at, mask=known, other=0)
    now = tl.load(clock)
    if layer == last:
        tl.store(clock, now + 1)
    r = tl.arange(0, R)
    chosen = choice[:, None] == expert[None, :]  # [R, E]
    routed = (tl.max(chosen.to(tl.int32), axis=0) > 0) & known
    if FREQUENCY:
        use = now.to(tl.float32) / half_life
        if WEIGHED:
            use += 0.5 * tl.log2(tl.maximum(probability, 1e-30))
        most = tl.maximum(value, use)
        used = most + tl.log2(tl.exp2(value - most) + tl.exp2(use - most))
    else:
        used = tl.zeros((E,), tl.float32) + now.to(tl.float32)
    value = tl.where(routed | WEIGHED, used, value)
    under_way = waiting == 2  # the copy of a prefetch may still run: its rows wait for it, and its slot cannot be given away
    missing = routed & (slot < 0)
    num_missing = tl.sum(missing.to(tl.int32), axis=0)
    num_routed = tl.sum(routed.to(tl.int32), axis=0)
    num_used = tl.sum((routed & (waiting > 0)).to(tl.int32), axis=0)
    waiting = tl.where(routed, 0, tl.minimum(waiting, 1))
    pending = missing | (routed & under_way)
    num_copied = num_missing
    if HOST:
        num_copied = num_missing - tl.load(shares + num_missing)
    lent = tl.zeros((E,), tl.int32) - 1
    for i in range(num_copied):
        incoming = tl.min(tl.where(missing, expert, E), axis=0)
        if HOST:
            incoming = _highest(value, missing, expert, E)
        victim = _lowest(value, (slot >= 0) & ~routed & ~under_way, expert, E)
        freed = tl.max(tl.where(expert == victim, slot, -1), axis=0)
        gets = expert == incoming
        if TOKENS > 1:
            lent = tl.where(gets & (victim == E), spare, lent)
            gets = gets & (victim < E)
        slot = tl.where(expert == victim, -1, tl.where(gets, freed, slot))
        if TOKENS > 1:
            freed = tl.where(victim == E, spare, freed)
            spare += (victim == E).to(tl.int32)
        waiting = tl.where(expert == victim, 0, waiting)
        missing = missing & (expert != incoming)
        tl.store(wanted + 2 * i, layer * num_experts + incoming)
        tl.store(wanted + 2 * i + 1, freed)
    tl.store(count, num_copied)
    here = tl.maximum(slot, lent) if TOKENS > 1 else slot
    tl.store(slots + r, tl.max(tl.where(chosen, here[None, :], -1), axis=1), mask=r < num_rows)
    counted = counters + layer * 5
    if ADMITS:
        incoming = _highest(value, missing, expert, E)
        victim = _lowest(value, (slot >= 0) & ~routed & ~under_way, expert, E)
        gain = tl.max(tl.where(expert == incoming, value, float("-inf")), axis=0)
        loss = tl.max(tl.where(expert == victim, value, float("-inf")), axis=0)
        admits = ((now + layer) % admit_every == 0) & (num_copied == 0) & (victim < E) & (gain > loss)
        freed = tl.max(tl.where(expert == victim, slot, -1), axis=0)
        slot = tl.where(admits & (expert == victim), -1, tl.where(admits & (expert == incoming), freed, slot))
        waiting = tl.where(admits & (expert == victim), 0, tl.where(admits & (expert == incoming), 1, waiting))
        tl.store(behind, layer * num_experts + incoming)
        tl.store(behind + 1, freed)
        tl.store(behind + 2, admits.to(tl.int32))
        tl.store(counted + 2, tl.load(counted + 2) + admits.to(tl.int64))
    tl.store(slot_of + at, slot, mask=known)
    tl.store(score + at, value, mask=known)
    tl.store(unused + at, waiting, mask=known)
    state = pending.to(tl.int32)
    hosted = missing.to(tl.int32)
    if HOST and TOKENS == 1:
        ask_experts(questions, asked, hosted, hosted, at, x, tokens, cols, MOST, 1024)
        state = tl.where(missing, 1 + tl.cumsum(hosted, axis=0), state)
    states = tl.where(chosen, state[None, :], 0)
    if HOST and TOKENS > 1:  # an answer has a row for each of an expert's tokens
        mine = chosen.to(tl.int32)
        masks = tl.sum(mine << (r // (num_rows // TOKENS))[:, None], axis=0)
        ask_experts(questions, asked, hosted, masks, at, x, tokens, cols, MOST, 1024)
        pairs = hosted * tl.sum(mine, axis=0)
        place = tl.cumsum(pairs, axis=0) - pairs
        states = tl.where(chosen & missing[None, :], 1 + place[None, :] + tl.cumsum(mine, axis=0), states)
    tl.store(pending_rows + r, tl.max(states, axis=1), mask=r < num_rows)
    tl.store(counted, tl.load(counted) + num_routed - num_missing)
    tl.store(counted + 1, tl.load(counted + 1) + num_missing)
    tl.store(counted + 3, tl.load(counted + 3) + num_used)
    tl.store(counted + 4, tl.load(counted + 4) + num_missing - num_copied)


@triton.jit(do_not_specialize=["layer", "last"])
def residency_kernel(
    index,
    hidden,
    staged,
    slots,
    pending_rows,
    wanted,
    count,
    slot_of,
    score,
    unused,
    counters,
    clock,
    layer,
    last,
    half_life,
    num_experts: tl.constexpr,
    num_rows: tl.constexpr,
    cols: tl.constexpr,
    PLANES: tl.constexpr,
    FREQUENCY: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Residency after the routing of ``layer``: ``index`` int64 [rows] (outside 0..num_experts-1: no expert). Grid (1 + tokens).

    Program 0 fills ``slots`` int32 [rows] (-1: no expert), ``pending_rows`` int32 [rows] (1: being copied), ``wanted``
    int32 [.., 2] pairs (expert of the whole model, slot) and ``count`` int32 [1], and moves the tables; layer ``last`` advances
    ``clock`` int32 [1] for the next token. The other programs stage the tokens' activations for ``gate_up_kernel``. The quota must
    be at least the number of distinct experts in ``index`` plus the prefetches of one layer.
    """
    if tl.program_id(0) > 0:
        groups: tl.constexpr = (cols + 63) // 64
        stage_token(hidden, staged, tl.program_id(0) - 1, cols, groups, PLANES, BLOCK)
    else:
        r = tl.arange(0, R)
        choice = tl.load(index + r, mask=r < num_rows, other=-1).to(tl.int32)
        _assign_slots(
            choice, choice, slots, pending_rows, wanted, count, slot_of, score, unused, counters, clock, layer, last, half_life,
            count, count, count, count, 0, 0, hidden, 1, num_experts, num_rows, cols, FREQUENCY, False, False, False, 0, 1, E, R,
        )  # fmt: skip


@triton.jit
def logits_kernel(hidden, weight, logits, cols: tl.constexpr, num_experts: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr):
    """logits[t] = weight hidden[t], fp32: a router [num_experts, cols] on another layer's router input. Grid (tokens, experts /
    BE)."""
    token = tl.program_id(0)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros((BE,), tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + token * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        mask = (expert < num_experts)[:, None] & (col < cols)[None, :]
        w = tl.load(weight + expert[:, None] * cols + col[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(w * x[None, :], axis=1)
    tl.store(logits + token * num_experts + expert, total, mask=expert < num_experts)


@triton.jit
def _look_ahead(
    logits,
    wanted,
    count,
    slot_of,
    score,
    unused,
    counters,
    clock,
    layer,
    num_tokens,
    stride,
    num_predicted,
    min_probability,
    limit,
    num_experts: tl.constexpr,
    FREQUENCY: tl.constexpr,
    E: tl.constexpr,
    correction=None,
    SIGMOID: tl.constexpr = False,
    CORRECTED: tl.constexpr = False,
):
    """See ``prefetch_kernel``; with SIGMOID scores are what the softmax is of. A token's logits begin every ``stride``."""
    expert = tl.arange(0, E)
    known = expert < num_experts
    at = layer * num_experts + expert
    none = tl.zeros((E,), tl.float32) + 1.0
    for token in range(num_tokens):
        x = tl.load(logits + token * stride + expert, mask=known, other=float("-inf"))
        if SIGMOID:
            x = tl.where(known, tl.sigmoid(x), float("-inf"))
            if CORRECTED:
                x += tl.load(correction + expert, mask=known, other=0.0).to(tl.float32)
        p = tl.exp(x - tl.max(x, axis=0))
        none *= 1.0 - p / tl.sum(p, axis=0)
    chance = tl.where(known, 1.0 - none, -1.0)
    slot = tl.load(slot_of + at, mask=known, other=-1)
    above = (chance[None, :] > chance[:, None]) | ((chance[None, :] == chance[:, None]) & (expert[None, :] < expert[:, None]))
    rank = tl.sum(above.to(tl.int32), axis=1)  # of each expert among all, 0 the likeliest
    expected = known & (rank < num_predicted) & (chance >= min_probability)
    value = tl.load(score + at, mask=known, other=0.0)
    waiting = tl.minimum(tl.load(unused + at, mask=known, other=0), 1)  # older copies end first: one lane
    now = tl.load(clock).to(tl.float32)
    missing = expected & (slot < 0)
    evictable = (slot >= 0) & ~expected
    num = tl.minimum(tl.sum(missing.to(tl.int32), axis=0), tl.minimum(limit, tl.sum(evictable.to(tl.int32), axis=0)))
    for i in range(num):
        best = tl.min(tl.where(missing, rank, E), axis=0)
        incoming = tl.min(tl.where(missing & (rank == best), expert, E), axis=0)
        victim = _lowest(value, evictable, expert, E)
        freed = tl.max(tl.where(expert == victim, slot, -1), axis=0)
        slot = tl.where(expert == victim, -1, tl.where(expert == incoming, freed, slot))
        waiting = tl.where(expert == victim, 0, tl.where(expert == incoming, 2, waiting))
        if not FREQUENCY:
            value = tl.where(expert == incoming, -64.0 * now - i, value)  # the latest and least likely goes first
        missing = missing & (expert != incoming)
        evictable = evictable & (expert != victim)
        tl.store(wanted + 2 * i, layer * num_experts + incoming)
        tl.store(wanted + 2 * i + 1, freed)
    tl.store(count, num)
    tl.store(slot_of + at, slot, mask=known)
    tl.store(score + at, value, mask=known)
    tl.store(unused + at, waiting, mask=known)
    counted = counters + layer * 5
    tl.store(counted + 2, tl.load(counted + 2) + num)


@triton.jit(do_not_specialize=["layer", "num_tokens", "num_predicted", "limit"])
def prefetch_kernel(
    logits,
    wanted,
    count,
    slot_of,
    score,
    unused,
    counters,
    clock,
    layer,
    num_tokens,
    num_predicted,
    min_probability,
    limit,
    num_experts: tl.constexpr,
    FREQUENCY: tl.constexpr,
    E: tl.constexpr,
):
    """Choose what to fetch ahead for ``layer`` from ``logits`` fp32 [num_tokens, num_experts]. One program.

    An expert's probability is that at least one token chooses it, with softmax as the chance of each token. The ``num_predicted``
    likeliest of at least ``min_probability`` are expected: those that are resident are not evicted here, and the ``limit``
    likeliest of the others get slots and are listed in ``wanted`` and ``count`` as ``residency_kernel`` does.
    """
    _look_ahead(
        logits, wanted, count, slot_of, score, unused, counters, clock, layer, num_tokens, num_experts, num_predicted,
        min_probability, limit, num_experts, FREQUENCY, E,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "last", "num_predicted", "limit", "admit_every", "spare"])
def route_kernel(
    logits, next_logits, choices, chances, live, routing_weights, slots, pending_rows, wanted, count, ahead, ahead_count, slot_of,
    score, unused, counters, clock, layer, last, stride, next_stride, half_life, num_predicted, min_probability, limit, shares,
    questions, asked, behind, admit_every, spare, x, correction, next_correction, scale, floor, spread,
    num_experts: tl.constexpr, top_k: tl.constexpr, cols: tl.constexpr, TOKENS: tl.constexpr, SCORES: tl.constexpr,
    CORRECTED: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr, NORMALIZE: tl.constexpr,
    ROUNDS: tl.constexpr, SIGMOID_NEXT: tl.constexpr, FREQUENCY: tl.constexpr, WEIGHED: tl.constexpr, HOST: tl.constexpr,
    ADMITS: tl.constexpr, MOST: tl.constexpr, E: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """For TOKENS tokens (a power of two), of which the first ``live`` int32 [1] are there, a router (``kernels/routing.py``), its
    residency step and the next layer's prefetch. Grid (1) or (2).

    ``logits`` fp32 [num_experts] are this layer's, ``next_logits`` the next one's on the same router input; a token's begin every
    ``stride`` and ``next_stride``. Program 0 writes ``routing_weights`` [top_k] (see ``choose``; of several tokens
    ``choose_kernel`` has, to these and to ``choices`` and ``chances``), and does what ``residency_kernel`` does; program 1 what
    ``prefetch_kernel`` does for ``layer + 1``, into ``ahead`` and ``ahead_count``; with SIGMOID_NEXT from the sigmoids of
    ``next_logits`` plus ``next_correction`` [num_experts]. With HOST the host is asked for misses on the router inputs ``x``
    [TOKENS, cols], and with ADMITS some of them get slots behind the step: see ``_assign_slots``.
    """
    if tl.program_id(0) == 1:
        _look_ahead(
            next_logits, ahead, ahead_count, slot_of, score, unused, counters, clock, layer + 1,
            tl.load(live) if next_stride > 0 else 1, next_stride, num_predicted, min_probability, limit, num_experts, FREQUENCY, E,
            next_correction, SIGMOID_NEXT, CORRECTED,
        )  # fmt: skip
    else:
        r = tl.arange(0, R)
        if TOKENS == 1:
            choice, weight, p = choose(
                logits, correction, x.dtype.element_ty, scale, floor, spread, num_experts, top_k, SCORES, CORRECTED, GROUPS,
                TOP_GROUPS, GROUP_BEST, NORMALIZE, ROUNDS, E, R,
            )  # fmt: skip
            tl.store(routing_weights + r, weight.to(routing_weights.dtype.element_ty), mask=r < top_k)
        else:
            choice = tl.load(choices + r, mask=r < TOKENS * top_k, other=-1)
            expert = tl.arange(0, E)[None, :]
            at = chances + tl.arange(0, TOKENS)[:, None] * num_experts + expert
            p = tl.max(tl.load(at, mask=expert < num_experts, other=0.0), axis=0)
        _assign_slots(
            choice, p, slots, pending_rows, wanted, count, slot_of, score, unused, counters, clock, layer, last, half_life,
            shares, questions, asked, behind, admit_every, spare, x, 1 if TOKENS == 1 else tl.load(live), num_experts,
            TOKENS * top_k, cols, FREQUENCY, WEIGHED, HOST, ADMITS, MOST, TOKENS, E, R,
        )  # fmt: skip
