"""Decode on the GPU: the chosen experts' MLP for a few tokens, straight from their slots in the VRAM pool, in two launches.

Twins: ``reference.linear_quantized`` and ``reference.expert_mlp``; quantized experts give the twin's bits. Weights are never
written out dequantized: a group's integer sum is made of its planes one by one, D = 4 (h . x) + (2 m + l) . x, four products at a
time.

Tiles of quantized rows are [rows, lanes]: a lane has one group of 64 columns (of one-byte codes a quarter of one), so a warp reads
whole rows, and what a lane needs of the activation stays in its registers for all rows. Only the chain that adds a row's groups in
order wants them in one thread: the terms of all rows of a program are turned around once, when all are there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_activations import activate
from fate_moe.kernels.triton_quantize import dot4, four, halves, quantize_groups, store_group, to_float, two

__all__ = ["down_kernel", "gate_up_kernel"]


@triton.jit
def _plane(plane, row, mask, first, groups: tl.constexpr, LANES: tl.constexpr, N: tl.constexpr):
    """int32 [R, N LANES]: N words of a plane for each of the groups ``first`` .. + LANES of rows ``row`` [R, 1]."""
    n = tl.arange(0, LANES * N)[None, :]
    if groups % LANES != 0:
        mask = mask & (first + n // N < groups)
    return tl.load(plane.to(tl.pointer_type(tl.int32)) + (row * (groups * N) + first * N + n), mask=mask, other=0)


@triton.jit
def _read(
    step, blob, place, jump, limit, mask, scale_at, zero_at, h_at, m_at, l_at, groups: tl.constexpr, PLANES: tl.constexpr,
    HALF: tl.constexpr, STEPS: tl.constexpr, PER: tl.constexpr, LANES: tl.constexpr, APART: tl.constexpr
):  # fmt: skip
    """What is multiplied in ``step``, counted through all blocks of groups (see ``_products``): codes, and of those in planes
    scales and zeros."""
    each: tl.constexpr = 4 if PLANES == 8 else 1  # lanes of a group
    covered: tl.constexpr = LANES // each
    step = tl.minimum(step, (groups + covered - 1) // covered * STEPS - 1)
    first, step = step // STEPS * covered, step % STEPS
    row = place + step % HALF * PER
    mask = mask & (row < limit)
    row = row * APART + step // HALF * jump
    h = _plane(blob + h_at, row, mask, first, groups, covered, 4 * each)
    m = _plane(blob + m_at, row, mask, first, groups, covered, 2) if (PLANES == 2 or PLANES == 3) else h
    low = _plane(blob + l_at, row, mask, first, groups, covered, 2) if PLANES == 3 else h
    scale, zero = h, h
    if PLANES != 8:
        scale, zero = _factors(blob, row, mask, first, scale_at, zero_at, groups, covered)
    return h, m, low, scale, zero


@triton.jit
def _factors(blob, row, mask, first, scale_at, zero_at, groups: tl.constexpr, COVERED: tl.constexpr):
    """Scales and zeros [R, COVERED] of the groups from ``first`` on of rows ``row`` [R, 1]."""
    g = first + tl.arange(0, COVERED)[None, :]
    if groups % COVERED != 0:
        mask = mask & (g < groups)
    at = row * groups + g
    scale = tl.load((blob + scale_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0)
    zero = tl.load((blob + zero_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0)
    return scale, zero


@triton.jit
def _field(words, first, J: tl.constexpr, groups: tl.constexpr, LANES: tl.constexpr):
    """The activation's elements 16 J .. + 15 of each group, four words. Beyond the last group some words of the same activation:
    their scale is taken for 0."""
    return four(tl.load(words + ((J * groups + first) * 4 + tl.arange(0, LANES * 4)[None, :])), LANES)


@triton.jit
def _pairs(words, first, S: tl.constexpr, groups: tl.constexpr, LANES: tl.constexpr):
    """The activation's elements S, + 8, + 16, + 24 of each half of a group, then those of S + 1: four words."""
    at = words + 16 * groups + tl.arange(0, LANES * 2)[None, :]
    e0, e1 = two(tl.load(at + (S * groups + first) * 2), LANES)
    o0, o1 = two(tl.load(at + ((S + 1) * groups + first) * 2), LANES)
    return e0, e1, o0, o1


@triton.jit
def _sums(words, first, groups: tl.constexpr, COVERED: tl.constexpr):
    """The sums [R or 1, COVERED] of the groups' codes."""
    g = first + tl.arange(0, COVERED)[None, :]
    at = words.to(tl.pointer_type(tl.float32)) + (33 * groups + g)
    return tl.load(at, mask=tl.broadcast_to(g < groups, at.shape), other=0.0)


@triton.jit
def _activation(words, first, groups: tl.constexpr, PLANES: tl.constexpr, LANES: tl.constexpr):
    """What lanes multiply by codes in planes, of the activations staged at ``words`` [R or 1, 1]; first the sums of groups."""
    x_sum = _sums(words, first, groups, LANES)
    x0 = _field(words, first, 0, groups, LANES)
    x1 = _field(words, first, 1, groups, LANES)
    x2 = _field(words, first, 2, groups, LANES)
    x3 = _field(words, first, 3, groups, LANES)
    if PLANES == 1:
        return x_sum, x0, x1, x2, x3, x0, x0, x0, x0
    p0 = _pairs(words, first, 0, groups, LANES)
    p2 = _pairs(words, first, 2, groups, LANES)
    p4 = _pairs(words, first, 4, groups, LANES)
    p6 = _pairs(words, first, 6, groups, LANES)
    return x_sum, x0, x1, x2, x3, p0, p2, p4, p6


@triton.jit
def _dot16(a0, a1, a2, a3, x, MASK: tl.constexpr):
    """The sum of sixteen products: of the masked bytes of four words with those of ``x``."""
    total = dot4(a0 & MASK, x[0], tl.zeros_like(a0))
    total = dot4(a1 & MASK, x[1], total)
    total = dot4(a2 & MASK, x[2], total)
    return dot4(a3 & MASK, x[3], total)


@triton.jit
def _term(read, x, PLANES: tl.constexpr, LANES: tl.constexpr):
    """[R, LANES] fp32: w of each lane's group of codes in planes, from what ``_read`` and ``_activation`` read.

    A field is not shifted down before it is multiplied: its sum is a multiple of what it stands higher, and is shifted once.
    """
    middle: tl.constexpr = 0.5 if PLANES == 2 else (1.5 if PLANES == 1 else 0.0)
    planes, m, low, scale, zero = read
    h0, h1, h2, h3 = four(planes, LANES)
    D = _dot16(h0, h1, h2, h3, x[1], 0x03030303) << 2
    D += _dot16(h0, h1, h2, h3, x[2], 0x0C0C0C0C)
    D += _dot16(h0, h1, h2, h3, x[3], 0x30303030) >> 2
    D += _dot16(h0, h1, h2, h3, x[4], -0x3F3F3F40) >> 4
    if PLANES == 2 or PLANES == 3:
        # Bits b, b + 1 = 2 m + l of element b: of even b in `even`, of odd b (one place lower) in `odd`.
        even, odd = (m << 1) & -0x55555556, m & -0x55555556
        if PLANES == 3:
            even, odd = even | (low & 0x55555555), odd | ((low >> 1) & 0x55555555)
        e0, e1 = two(even, LANES)
        o0, o1 = two(odd, LANES)
        D += _dot16(e0, e1, o0, o1, x[5], 0x03030303)
        D += _dot16(e0, e1, o0, o1, x[6], 0x0C0C0C0C) >> 2
        D += _dot16(e0, e1, o0, o1, x[7], 0x30303030) >> 4
        D += _dot16(e0, e1, o0, o1, x[8], -0x3F3F3F40) >> 6
    scale = scale.to(tl.float32)
    offset = (scale * middle - zero.to(tl.float32)) * x[0]
    return tl.fma(scale, to_float(D), offset)


@triton.jit
def _byte_sums(codes, x, LANES: tl.constexpr):
    """[R, LANES] int32: each lane's products of one-byte codes [R, 4 LANES] with ``x``."""
    c0, c1, c2, c3 = four(codes, LANES)
    return _dot16(c0, c1, c2, c3, x, -1)


@triton.jit
def _chain(y, w, factors, COUNT: tl.constexpr):
    """``y`` [R] plus the products of the COUNT columns of ``w`` [R, N] with the numbers at ``factors`` (one pointer, or one per
    row), added one by one in their order."""
    if w.shape[1] == 1:
        factor = tl.load(factors).to(tl.float32)
        y = tl.fma(factor + tl.zeros_like(y), tl.reshape(w, y.shape), y)
    else:
        half: tl.constexpr = w.shape[1] // 2
        first, second = halves(w)
        y = _chain(y, first, factors, COUNT)
        if half < COUNT:
            y = _chain(y, second, factors + half, COUNT - half)
    return y


@triton.jit
def _products(
    blob, place, jump, limit, mask, x, x_of_row, scale_at, zero_at, h_at, m_at, l_at, groups: tl.constexpr, PLANES: tl.constexpr,
    HALF: tl.constexpr, STEPS: tl.constexpr, PER: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
    EARLY: tl.constexpr, APART: tl.constexpr = 1,
):  # fmt: skip
    """[STEPS R] fp32: quantized rows times staged activations, R rows a step.

    In step s these are the rows ``place`` [R, 1] + (s % HALF) PER, if below ``limit`` and in ``mask`` [R, 1], of the matrix whose
    rows are APART and begin s // HALF times ``jump`` rows further. ``blob`` [R, 1] points to the first byte of the rows' blob, ``x`` [R or 1, 1] to their
    activation, and ``x_of_row`` (one pointer, or [STEPS R]) too. What AHEAD steps read is on its way while one is multiplied; with
    EARLY the first of it before the kernel that writes the activations ends.
    """
    each: tl.constexpr = 4 if PLANES == 8 else 1
    covered: tl.constexpr = LANES // each
    rows: tl.constexpr = place.shape[0]
    words = x.to(tl.pointer_type(tl.int32))
    factors = x_of_row.to(tl.pointer_type(tl.float32)) + 32 * groups
    k = tl.arange(0, STEPS)[:, None, None]
    y = tl.zeros((STEPS * rows,), tl.float32)
    if PLANES == 8:
        s = tl.arange(0, STEPS)[:, None]
        row = tl.reshape(place, (1, rows)) + s % HALF * PER
        row_mask = tl.reshape(tl.reshape(mask, (1, rows)) & (row < limit), (STEPS * rows, 1))
        row = tl.reshape(row * APART + s // HALF * jump, (STEPS * rows, 1))
        blobs = tl.reshape(tl.broadcast_to(tl.reshape(blob, (1, rows)), (STEPS, rows)), (STEPS * rows, 1))
        words_of_row = (x_of_row + tl.zeros((STEPS * rows,), tl.int32))[:, None].to(tl.pointer_type(tl.int32))
    coming = ()
    for n in tl.static_range(AHEAD):
        coming += (
            _read(n, blob, place, jump, limit, mask, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, HALF, STEPS, PER, LANES, APART),
        )
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for first in tl.range(0, groups, covered):
        if PLANES == 8:  # scales are under way while the products are made
            x_now = four(tl.load(words + (first * 16 + tl.arange(0, LANES * 4)[None, :])), LANES)
            scale, zero = _factors(blobs, row, row_mask, first, scale_at, zero_at, groups, covered)
            x_sum = _sums(words_of_row, first, groups, covered)
        else:
            x_now = _activation(words, first, groups, PLANES, LANES)
        w = tl.zeros((STEPS, rows, LANES), tl.int32 if PLANES == 8 else tl.float32)
        for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
            later = _read(
                first // covered * STEPS + step + AHEAD, blob, place, jump, limit, mask, scale_at, zero_at, h_at, m_at, l_at,
                groups, PLANES, HALF, STEPS, PER, LANES, APART,
            )  # fmt: skip
            term = _byte_sums(coming[0][0], x_now, LANES) if PLANES == 8 else _term(coming[0], x_now, PLANES, LANES)
            w = tl.where(k == step, term[None, :, :], w)
            coming = coming[1:] + (later,)  # noqa: RUF005 (Triton has no other way)
        if PLANES == 8:
            D = tl.sum(tl.reshape(w, (STEPS * rows, covered, 4)), axis=2)
            w = tl.fma(scale.to(tl.float32), to_float(D), (0.0 - zero.to(tl.float32)) * x_sum)
        else:
            w = tl.reshape(w, (STEPS * rows, LANES))
        y = _chain(y, w, factors + first, min(groups, covered))
    return y


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
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    MIXED: tl.constexpr,
    BIAS_AT: tl.constexpr,
    BIAS: tl.constexpr,
    PHASE: tl.constexpr,
    BN: tl.constexpr,
    GB: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """inner[r] = act(gate(x)) * up(x), staged, for choice row r = token * top_k + choice. Grid (choice rows, width / BN).

    ``slots`` int32 [rows], -1 where a row has no expert (its inner is 0); ``pending`` int32 [rows]: PHASE 0 computes the rows whose
    expert is there, 1 those whose expert is being copied when the residency step ends, 2 all (above 1: the host computes them).
    ``width`` is the experts' inner size; PLANES 0 means unquantized, 8 one byte a code. Of quantized experts BN is 64: a program
    has a whole group of inner values; with MIXED gate and up rows take turns, and with BIAS_AT not negative there are biases of dtype
    BIAS in the blob. GB: lanes of a row, of unquantized experts groups at once; ROWS: rows at once. With EARLY the
    next kernel may begin at once; it must wait before it reads ``inner``.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
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
                place = tl.program_id(1) * 64 + tl.arange(0, ROWS)[:, None]
                y = _products(
                    blob + tl.zeros_like(place), place, 1 if MIXED else width, width, place >= 0, x + tl.zeros((1, 1), tl.int32), x, scale_at,
                    zero_at, h_at, m_at, l_at, groups, PLANES, 64 // ROWS, 128 // ROWS, ROWS, GB, 4 if PLANES == 8 else 2, 4, False,
                    2 if MIXED else 1,
                )  # fmt: skip
                gate, up = tl.split(tl.trans(tl.reshape(y, (2, 64))))
                if BIAS_AT >= 0:
                    bias = (blob + BIAS_AT).to(tl.pointer_type(BIAS))
                    gate += tl.load(bias + (2 * n if MIXED else n), mask=n < width, other=0.0).to(tl.float32)
                    up += tl.load(bias + (2 * n + 1 if MIXED else n + width), mask=n < width, other=0.0).to(tl.float32)
            value = activate(gate, up, ACT, ALPHA, LIMIT, OFFSET)
        else:
            value = tl.zeros((BN,), tl.float32)
        value = tl.where(n < width, value, 0.0)
        to = inner + r * (inner_groups * 64)
        if PLANES == 0:
            tl.store(to + n, value, mask=n < inner_groups * 64)
        else:
            codes, scale, total = quantize_groups(tl.reshape(value, (1, 64)))
            g = tl.program_id(1) + tl.zeros((1, 1), tl.int32)
            store_group(to, codes, scale, total, g, g < inner_groups, inner_groups, PLANES)


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
    BIAS_AT: tl.constexpr,
    BIAS: tl.constexpr,
    HOST: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    GB: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[t] = the sum of routing weight times down(inner) over choices, in routing order (``reference.combine``). Grid (tokens,
    cols / BN).

    One tile holds BN output rows of all ``top_k`` experts (KP is the next power of two). ``out`` [T, cols] in its own dtype; with
    RESIDUAL plus ``residual`` [T, cols], which it may be. With EARLY the launch overlaps ``gate_up_kernel``'s. With HOST the rows
    with ``pending`` 2 or more are taken as they are from ``outside`` fp32 [rows, cols].
    """
    token = tl.program_id(0)
    inner_groups: tl.constexpr = (width + 63) // 64
    i = tl.arange(0, KP * BN)[None, :] if PLANES == 0 else tl.arange(0, ROWS)[:, None]
    choice = i % KP
    row = tl.program_id(1) * BN + i // KP
    chosen = choice < top_k
    slot = tl.load(slots + token * top_k + choice, mask=chosen, other=-1)
    blob = pool + tl.maximum(slot, 0).to(tl.int64) * slot_bytes
    first = inner + token * top_k * (inner_groups * 64)
    x = first + tl.minimum(choice, top_k - 1) * (inner_groups * 64)
    if PLANES == 0:
        y = _dense_dot(blob, row, (slot >= 0) & (row < cols), x, scale_at, width, inner_groups, DTYPE, KP * BN, GB)
    else:
        x_of_row = first + tl.minimum(tl.arange(0, KP * BN) % KP, top_k - 1) * (inner_groups * 64)
        y = _products(
            blob, row, 0, cols, slot >= 0, x, x_of_row, scale_at, zero_at, h_at, m_at, l_at, inner_groups, PLANES,
            BN * KP // ROWS, BN * KP // ROWS, ROWS // KP, GB, 4 if PLANES == 8 else 3, 2, EARLY,
        )  # fmt: skip
    y = tl.reshape(y, (BN, KP))
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    if BIAS_AT >= 0:
        k = tl.arange(0, KP)[None, :]
        of = tl.load(slots + token * top_k + k, mask=k < top_k, other=-1)
        bias = (pool + tl.maximum(of, 0).to(tl.int64) * slot_bytes + BIAS_AT).to(tl.pointer_type(BIAS))
        y += tl.load(bias + n[:, None], mask=(of >= 0) & (n < cols)[:, None], other=0.0).to(tl.float32)
    if HOST:
        k = tl.arange(0, KP)[None, :]
        r = token * top_k + k
        elsewhere = tl.load(pending + r, mask=k < top_k, other=0) > 1
        there = tl.load(outside + r * cols + n[:, None], mask=elsewhere & (n < cols)[:, None], other=0.0)
        y = tl.where(elsewhere, there, y)
    total = _chain(tl.zeros((BN,), tl.float32), y, routing_weights + token * top_k, top_k)
    if RESIDUAL:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + token * cols + n, mask=n < cols, other=0.0).to(tl.float32)
    tl.store(out + token * cols + n, total.to(out.dtype.element_ty), mask=n < cols)
