"""Decode on the GPU: the chosen experts' MLP for a few tokens, straight from their slots in the VRAM pool, in two launches.

Twins: ``reference.linear_quantized`` and ``reference.expert_mlp``; quantized experts give the twin's bits. Weights are never written
out dequantized: a group's integer sum is made of its planes one by one, D = 4 (h . x) + (2 m + l) . x, four products at a time.

Tiles of quantized rows are [rows, lanes], lanes along a row's bytes: of planes four groups at a time (a row's 64 neighbouring bytes of
the 2-bit plane), of one-byte codes one group. So whole sectors are read, and the chain that adds a row's groups in order is made in
registers: each group's term is handed to all lanes of its row, and these do the same additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_activations import activate
from fate_moe.kernels.triton_quantize import dot4, quantize_groups, store_group, to_float

__all__ = ["down_kernel", "gate_up_kernel"]


@triton.jit
def _factors(blob, at, mask, scale_at, zero_at):
    """Scales and zeros fp32 of groups ``at`` of a matrix."""
    scale = tl.load((blob + scale_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load((blob + zero_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
    return scale, zero


@triton.jit
def _lane(values, lane, k):
    """[ROWS, 1]: lane ``k`` of ``values`` fp32 [ROWS, GB]. Of bits among zeros, a sum is a copy."""
    bits = tl.where(lane == k, values.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=1)[:, None].to(tl.float32, bitcast=True)


@triton.jit
def _plane(plane, row, row_mask, first, groups: tl.constexpr, GB: tl.constexpr, N: tl.constexpr):
    """int32 [ROWS, GB, N]: N words of a plane for each of the groups ``first`` .. + GB of rows ``row`` [ROWS, 1]."""
    n = tl.arange(0, GB * N)[None, :]
    at = plane.to(tl.pointer_type(tl.int32)) + (row * (groups * N) + first * N + n)
    if groups % GB == 0:
        words = tl.load(at, mask=row_mask, other=0)
    else:
        words = tl.load(at, mask=row_mask & (first + n // N < groups), other=0)
    return tl.reshape(words, (words.shape[0], GB, N))


@triton.jit
def _words(words, first, GB: tl.constexpr, N: tl.constexpr):
    """int32 [ROWS, GB, N]: N words of each of GB neighbouring groups of an activation, the first at ``words`` [ROWS, 1] + ``first``.

    Beyond the last group these are some words of the same activation; its scale is taken for 0 there.
    """
    some = tl.load(words + (first + tl.arange(0, GB * N)[None, :]))
    return tl.reshape(some, (some.shape[0], GB, N))


@triton.jit
def _activation(words, first, groups: tl.constexpr, GB: tl.constexpr):
    """All words of the groups ``first`` .. + GB of the activation at ``words`` [ROWS, 1]: four of [ROWS, GB, 4], eight of [ROWS, GB, 2]."""
    bits = words + 16 * groups
    return (
        _words(words, first * 4, GB, 4),
        _words(words, (groups + first) * 4, GB, 4),
        _words(words, (2 * groups + first) * 4, GB, 4),
        _words(words, (3 * groups + first) * 4, GB, 4),
        _words(bits, first * 2, GB, 2),
        _words(bits, (groups + first) * 2, GB, 2),
        _words(bits, (2 * groups + first) * 2, GB, 2),
        _words(bits, (3 * groups + first) * 2, GB, 2),
        _words(bits, (4 * groups + first) * 2, GB, 2),
        _words(bits, (5 * groups + first) * 2, GB, 2),
        _words(bits, (6 * groups + first) * 2, GB, 2),
        _words(bits, (7 * groups + first) * 2, GB, 2),
    )


@triton.jit
def _int4_terms(
    blob,
    row,
    row_mask,
    xs,
    x_sum,
    first,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    groups: tl.constexpr,
    PLANES: tl.constexpr,
    GB: tl.constexpr,
):
    """[ROWS, GB] fp32: w of the groups ``first`` .. + GB of rows ``row`` [ROWS, 1] and the ``_activation`` ``xs``."""
    middle: tl.constexpr = 0.0 if PLANES == 3 else (0.5 if PLANES == 2 else 1.5)
    h = _plane(blob + h_at, row, row_mask, first, groups, GB, 4)
    total = tl.zeros_like(h)
    for j in tl.static_range(4):
        total = dot4((h >> (2 * j)) & 0x03030303, xs[j], total)
    D = tl.sum(total, axis=2) << 2
    if PLANES > 1:
        m = _plane(blob + m_at, row, row_mask, first, groups, GB, 2)
        if PLANES > 2:
            low = _plane(blob + l_at, row, row_mask, first, groups, GB, 2)
            # Bits b, b + 1 = 2 m + l of element b: of even b in `even`, of odd b (one place lower) in `odd`.
            even, odd = ((m << 1) & -0x55555556) | (low & 0x55555555), (m & -0x55555556) | ((low >> 1) & 0x55555555)
        else:
            even, odd = (m << 1) & -0x55555556, m & -0x55555556
        rest = tl.zeros_like(m)
        for s in tl.static_range(0, 8, 2):
            rest = dot4((even >> s) & 0x03030303, xs[4 + s], rest)
            rest = dot4((odd >> s) & 0x03030303, xs[5 + s], rest)
        D += tl.sum(rest, axis=2)
    g = first + tl.arange(0, GB)[None, :]
    mask = row_mask & (g < groups) if groups % GB != 0 else row_mask & (g >= 0)
    scale, zero = _factors(blob, row * groups + g, mask, scale_at, zero_at)
    return tl.fma(scale, to_float(D), (scale * middle - zero) * x_sum)


@triton.jit
def _int4_step(
    y,
    y_up,
    blob,
    row,
    up_row,
    row_mask,
    words,
    first,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    groups: tl.constexpr,
    PLANES: tl.constexpr,
    BOTH: tl.constexpr,
    GB: tl.constexpr,
):
    """The chains ``y`` and ``y_up`` [ROWS, GB], each the same in all lanes, GB groups further."""
    lane = tl.arange(0, GB)[None, :]
    factors = words.to(tl.pointer_type(tl.float32)) + 32 * groups
    g = first + lane
    x_sum = tl.load(factors + (groups + g), mask=(g < groups) & (row >= 0), other=0.0)
    xs = _activation(words, first, groups, GB)
    w = _int4_terms(blob, row, row_mask, xs, x_sum, first, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, GB)
    if BOTH:
        w_up = _int4_terms(blob, up_row, row_mask, xs, x_sum, first, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, GB)
    for k in tl.static_range(GB):
        each = factors + (first + k + tl.zeros_like(lane))
        if groups % GB == 0:
            a = tl.load(each)
        else:  # beyond the last group 0: a chain stays as it is
            a = tl.load(each, mask=first + k < groups, other=0.0)
        y = tl.fma(a, tl.broadcast_to(_lane(w, lane, k), a.shape), y)
        if BOTH:
            y_up = tl.fma(a, tl.broadcast_to(_lane(w_up, lane, k), a.shape), y_up)
    return y, y_up


@triton.jit
def _int8_step(y, y_up, blob, row, up_row, row_mask, words, g, scale_at, zero_at, codes_at, groups: tl.constexpr, BOTH: tl.constexpr):
    """The chains ``y`` and ``y_up`` [ROWS, 1] group ``g`` of one-byte codes further; lanes are the group's 16 words."""
    word = tl.arange(0, 16)[None, :]
    factors = words.to(tl.pointer_type(tl.float32)) + 32 * groups + g
    a, x_sum = tl.load(factors), tl.load(factors + groups)
    xs = tl.load(words + (g * 16 + word))
    codes = (blob + codes_at).to(tl.pointer_type(tl.int32))
    q = tl.load(codes + row * (groups * 16) + (g * 16 + word), mask=row_mask, other=0)
    D = tl.sum(dot4(q, xs, tl.zeros_like(q)), axis=1)[:, None]
    scale, zero = _factors(blob, row * groups + g, row_mask, scale_at, zero_at)
    y = tl.fma(a, tl.fma(scale, to_float(D), (0.0 - zero) * x_sum), y)
    if BOTH:
        q = tl.load(codes + up_row * (groups * 16) + (g * 16 + word), mask=row_mask, other=0)
        D = tl.sum(dot4(q, xs, tl.zeros_like(q)), axis=1)[:, None]
        scale, zero = _factors(blob, up_row * groups + g, row_mask, scale_at, zero_at)
        y_up = tl.fma(a, tl.fma(scale, to_float(D), (0.0 - zero) * x_sum), y_up)
    return y, y_up


@triton.jit
def _products(
    blob,
    row,
    up_row,
    row_mask,
    x,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    groups: tl.constexpr,
    PLANES: tl.constexpr,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    GB: tl.constexpr,
):
    """[ROWS] fp32: quantized rows ``row`` [ROWS, 1] times the staged activations at ``x`` [ROWS, 1], and with BOTH rows ``up_row``,
    which spares the second reading of the activation.

    ``blob`` [ROWS, 1] points to the first byte of the rows' blob.
    """
    words = x.to(tl.pointer_type(tl.int32))
    if PLANES == 8:
        y = tl.zeros((ROWS, 1), tl.float32)
        y_up = tl.zeros((ROWS, 1), tl.float32)
        for g in tl.range(0, groups, loop_unroll_factor=4):
            y, y_up = _int8_step(y, y_up, blob, row, up_row, row_mask, words, g, scale_at, zero_at, h_at, groups, BOTH)
        return tl.reshape(y, (ROWS,)), tl.reshape(y_up, (ROWS,))
    y = tl.zeros((ROWS, GB), tl.float32)
    y_up = tl.zeros((ROWS, GB), tl.float32)
    if groups <= 16 * GB:
        for first in tl.static_range(0, groups, GB):
            y, y_up = _int4_step(
                y, y_up, blob, row, up_row, row_mask, words, first, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, BOTH, GB
            )  # fmt: skip
    else:  # unrolled, the 56 steps of Mixtral's down would take minutes to compile
        for first in tl.range(0, groups, GB, loop_unroll_factor=4):
            y, y_up = _int4_step(
                y, y_up, blob, row, up_row, row_mask, words, first, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, BOTH, GB
            )  # fmt: skip
    lane = tl.arange(0, GB)[None, :]
    return tl.reshape(_lane(y, lane, 0), (ROWS,)), tl.reshape(_lane(y_up, lane, 0), (ROWS,))


@triton.jit
def _dense_dot(
    blob,
    row,
    row_mask,
    x,
    weight_at,
    cols: tl.constexpr,
    groups: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    GB: tl.constexpr,
):
    """[ROWS] fp32: unquantized rows ``row`` [1, ROWS] of ``cols`` numbers of ``DTYPE`` times the staged activation at ``x``.

    ``blob`` points to the first byte of the rows' blob; it and ``x`` are one pointer, or one per row [1, ROWS].
    """
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, groups * 64, GB * 64):
        element = start + tl.arange(0, GB * 64)[:, None]
        xs = tl.load(x + element, mask=element < cols, other=0.0)
        weights = (blob + weight_at).to(tl.pointer_type(DTYPE)) + row * cols + element
        total += tl.sum(tl.load(weights, mask=row_mask & (element < cols), other=0.0).to(tl.float32) * xs, axis=0)
    return total


@triton.jit
def gate_up_kernel(
    pool,
    slots,
    pending,
    staged,
    values,
    arrived,
    inner,
    slot_bytes,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    top_k: tl.constexpr,
    cols: tl.constexpr,
    width: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    ACT: tl.constexpr,
    PHASE: tl.constexpr,
    BN: tl.constexpr,
    GB: tl.constexpr,
):
    """inner[r] = act(gate(x)) * up(x), staged, for choice row r = token * top_k + choice. Grid (choice rows, width / BN).

    ``slots`` int32 [rows], -1 where a row has no expert (its inner is 0); ``pending`` int32 [rows]: PHASE 0 computes the rows whose
    expert is there, 1 those whose expert is being copied when the residency step ends, 2 all (above 1: the host computes them).
    ``width`` is the experts' inner size; PLANES 0 means unquantized, 8 one byte a code; GB: groups at once.

    Of quantized experts BN divides 64: programs leave their numbers in ``values`` fp32 [rows, padded width], and the one that comes
    last to a group (``arrived`` int32 [rows, groups] counts them, over all launches) quantizes it. No program waits for another.
    """
    r = tl.program_id(0)
    slot = tl.load(slots + r)
    wanted = True
    if PHASE < 2:
        wanted = tl.load(pending + r) == PHASE
    if wanted:
        groups: tl.constexpr = (cols + 63) // 64
        inner_groups: tl.constexpr = (width + 63) // 64
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        if slot >= 0:
            blob = pool + slot.to(tl.int64) * slot_bytes
            x = staged + (r // top_k) * (groups * 64)
            if PLANES == 0:
                i = tl.arange(0, 2 * BN)[None, :]
                place = tl.program_id(1) * BN + i % BN
                row = tl.where(i < BN, place, place + width)  # gate rows, then up rows
                both = _dense_dot(blob, row, place < width, x, scale_at, cols, groups, DTYPE, 2 * BN, GB)
                gate, up = tl.split(tl.trans(tl.reshape(both, (2, BN))))
            else:
                row = n[:, None]
                each = tl.zeros_like(row)
                every = tl.full((BN, 1), True, tl.int1) if width % BN == 0 else row < width
                gate, up = _products(
                    blob + each, row, row + width, every, x + each, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, True, BN, GB
                )  # fmt: skip
            value = activate(gate, up, ACT)
        else:
            value = tl.zeros((BN,), tl.float32)
        value = tl.where(n < width, value, 0.0)
        to = inner + r * (inner_groups * 64)
        if PLANES == 0:
            tl.store(to + n, value, mask=n < inner_groups * 64)
        else:
            tl.store(values + r * (inner_groups * 64) + n, value)
            tl.debug_barrier()  # all of this program's numbers before its count
            g = tl.program_id(1) // (64 // BN)
            count = tl.atomic_add(arrived + r * inner_groups + g, 1, sem="acq_rel")
            if count % (64 // BN) == 64 // BN - 1:
                k = tl.arange(0, 64)[None, :]
                whole = tl.load(values + r * (inner_groups * 64) + g * 64 + k, cache_modifier=".cg")
                codes, scale, total = quantize_groups(whole)
                at = g + tl.zeros((1, 1), tl.int32)
                store_group(to, codes, scale, total, at, at < inner_groups, inner_groups, PLANES)


@triton.jit
def down_kernel(
    pool,
    slots,
    pending,
    inner,
    outside,
    routing_weights,
    residual,
    out,
    slot_bytes,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    top_k: tl.constexpr,
    cols: tl.constexpr,
    width: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HOST: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    GB: tl.constexpr,
):
    """out[t] = the sum of routing weight times down(inner) over choices, in routing order (``reference.combine``). Grid (tokens,
    cols / BN).

    One tile holds BN output rows of all ``top_k`` experts (KP is the next power of two). ``out`` [T, cols] in its own dtype; with
    RESIDUAL plus ``residual`` [T, cols], which it may be. With HOST the rows with ``pending`` 2 or more are taken as they are from
    ``outside`` fp32 [rows, cols].
    """
    token = tl.program_id(0)
    inner_groups: tl.constexpr = (width + 63) // 64
    i = tl.arange(0, KP * BN)[None, :] if PLANES == 0 else tl.arange(0, KP * BN)[:, None]
    choice = i % KP
    row = tl.program_id(1) * BN + i // KP
    chosen = choice < top_k
    slot = tl.load(slots + token * top_k + choice, mask=chosen, other=-1)
    mask = (slot >= 0) & (row < cols)
    blob = pool + tl.maximum(slot, 0).to(tl.int64) * slot_bytes
    x = inner + (token * top_k + tl.minimum(choice, top_k - 1)) * (inner_groups * 64)
    if PLANES == 0:
        y = _dense_dot(blob, row, mask, x, scale_at, width, inner_groups, DTYPE, KP * BN, GB)
    else:
        y, _ = _products(
            blob, row, row, mask, x, scale_at, zero_at, h_at, m_at, l_at, inner_groups, PLANES, False, KP * BN, GB
        )  # fmt: skip
    y = tl.reshape(y, (BN, KP))
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, KP)[None, :]
    if HOST:
        r = token * top_k + k
        elsewhere = tl.load(pending + r, mask=k < top_k, other=0) > 1
        there = tl.load(outside + r * cols + n[:, None], mask=elsewhere & (n < cols)[:, None], other=0.0)
        y = tl.where(elsewhere, there, y)
    total = tl.zeros((BN, 1), tl.float32)
    for c in tl.static_range(top_k):
        routed = tl.load(routing_weights + token * top_k + c).to(tl.float32)
        total = tl.fma(routed + tl.zeros_like(total), _lane(y, k, c), total)
    total = tl.reshape(total, (BN,))
    if RESIDUAL:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + token * cols + n, mask=n < cols, other=0.0).to(tl.float32)
    tl.store(out + token * cols + n, total.to(out.dtype.element_ty), mask=n < cols)
