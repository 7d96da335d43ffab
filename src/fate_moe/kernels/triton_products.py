"""Rows of quantized matrices in slots times a few staged activations: what the kernels of ``triton_experts.py`` are made of.

Tiles of quantized rows are [rows, lanes]: a lane has one group of 64 columns (of one-byte codes a quarter of one), so a warp reads
whole rows, and what a lane needs of the activation stays in its registers for all rows. Only the chain that adds a row's groups in
order wants them in one thread: the terms of all rows of a program are turned around once, when all are there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_quantize import dot4, four, halves, to_float, two

__all__ = ["chain", "products"]


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
    """What is multiplied in ``step``, counted through all blocks of groups (see ``products``): codes, and of those in planes
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
        if PLANES == 3:  # (a & M) | (b & ~M), which is one instruction as it stands here
            even, odd = low ^ ((low ^ (m << 1)) & -0x55555556), (low >> 1) ^ (((low >> 1) ^ m) & -0x55555556)
        else:
            even, odd = (m << 1) & -0x55555556, m & -0x55555556
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
def chain(y, w, factors, COUNT: tl.constexpr):
    """``y`` [R] plus the products of the COUNT columns of ``w`` [R, N] with the numbers at ``factors`` (one pointer, or one per
    row), added one by one in their order."""
    if w.shape[1] == 1:
        factor = tl.load(factors).to(tl.float32)
        y = tl.fma(factor + tl.zeros_like(y), tl.reshape(w, y.shape), y)
    else:
        half: tl.constexpr = w.shape[1] // 2
        first, second = halves(w)
        y = chain(y, first, factors, COUNT)
        if half < COUNT:
            y = chain(y, second, factors + half, COUNT - half)
    return y


@triton.jit
def products(
    blob, place, jump, limit, mask, x, x_of_row, scale_at, zero_at, h_at, m_at, l_at, groups: tl.constexpr, PLANES: tl.constexpr,
    HALF: tl.constexpr, STEPS: tl.constexpr, PER: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
    EARLY: tl.constexpr, APART: tl.constexpr = 1,
):  # fmt: skip
    """[STEPS R] fp32: quantized rows times staged activations, R rows a step.

    In step s these are the rows ``place`` [R, 1] + (s % HALF) PER, if below ``limit`` and in ``mask`` [R, 1], of the matrix whose
    rows are APART and begin s // HALF times ``jump`` rows further. ``blob`` [R, 1] points to the first byte of the rows' blob,
    ``x`` [R or 1, 1] to their activation, and ``x_of_row`` (one pointer, or [STEPS R]) too. What AHEAD steps read is on its way
    while one is multiplied; with EARLY the first of it before the kernel that writes the activations ends.
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
            _read(
                n,
                blob,
                place,
                jump,
                limit,
                mask,
                scale_at,
                zero_at,
                h_at,
                m_at,
                l_at,
                groups,
                PLANES,
                HALF,
                STEPS,
                PER,
                LANES,
                APART,
            ),
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
        y = chain(y, w, factors + first, min(groups, covered))
    return y
