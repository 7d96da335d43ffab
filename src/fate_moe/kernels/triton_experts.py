"""Decode on the GPU: the chosen experts' MLP for a few tokens, straight from their slots in the VRAM pool, in two launches.

Twins: ``reference.linear_quantized`` and ``reference.expert_mlp``; quantized experts give the twin's bits. Weights are never
written out dequantized: a group's integer sum is made of its planes one by one, D = 4 (h . x) + (2 m + l) . x, four products at a
time.

Tiles of quantized rows are [rows, lanes], lanes along a row's bytes: of planes four groups at a time (a row's 64 neighbouring bytes
of the 2-bit plane), of one-byte codes one group. So whole sectors are read, and the chain that adds a row's groups in order is made
in registers: each group's term is handed to all lanes of its row, and these do the same additions.
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
def _four(words, GB: tl.constexpr):
    """The four words of each group, of ``words`` [ROWS, 4 GB]: each [ROWS, GB]."""
    rows: tl.constexpr = words.shape[0]
    even, odd = tl.split(tl.reshape(words, (rows, GB, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _two(words, GB: tl.constexpr):
    """The two words of each group, of ``words`` [ROWS, 2 GB]: each [ROWS, GB]."""
    rows: tl.constexpr = words.shape[0]
    return tl.split(tl.reshape(words, (rows, GB, 2)))


@triton.jit
def _plane(plane, row, row_mask, first, groups: tl.constexpr, GB: tl.constexpr, N: tl.constexpr):
    """int32 [ROWS, N GB]: N words of a plane for each of the groups ``first`` .. + GB of rows ``row`` [ROWS, 1]."""
    n = tl.arange(0, GB * N)[None, :]
    at = plane.to(tl.pointer_type(tl.int32)) + (row * (groups * N) + first * N + n)
    if groups % GB == 0:
        return tl.load(at, mask=row_mask, other=0)
    return tl.load(at, mask=row_mask & (first + n // N < groups), other=0)


@triton.jit
def _int4_words(
    blob, row, row_mask, first, scale_at, zero_at, h_at, m_at, l_at, groups: tl.constexpr, PLANES: tl.constexpr, GB: tl.constexpr
):
    """What rows ``row`` [ROWS, 1] have of the groups ``first`` .. + GB: planes, scale and zero."""
    h = _plane(blob + h_at, row, row_mask, first, groups, GB, 4)
    m = _plane(blob + m_at, row, row_mask, first, groups, GB, 2) if PLANES > 1 else h
    low = _plane(blob + l_at, row, row_mask, first, groups, GB, 2) if PLANES > 2 else h
    g = first + tl.arange(0, GB)[None, :]
    at = row * groups + g
    mask = row_mask & (g < groups) if groups % GB != 0 else row_mask & (g >= 0)
    scale = tl.load((blob + scale_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0)
    zero = tl.load((blob + zero_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0)
    return h, m, low, scale, zero


@triton.jit
def _field(h, words, first, MASK: tl.constexpr, J: tl.constexpr, groups: tl.constexpr, GB: tl.constexpr):
    """Sums of field ``J`` of the 2-bit plane's bytes, four words ``h``, with the staged activation ``words`` [ROWS, 1].

    Beyond the last group these are some words of the same activation; its scale is taken for 0 there.
    """
    x = _four(tl.load(words + ((J * groups + first) * 4 + tl.arange(0, GB * 4)[None, :])), GB)
    total = dot4(h[0] & MASK, x[0], tl.zeros_like(h[0]))
    total = dot4(h[1] & MASK, x[1], total)
    total = dot4(h[2] & MASK, x[2], total)
    return dot4(h[3] & MASK, x[3], total)


@triton.jit
def _pairs(even, odd, words, first, MASK: tl.constexpr, S: tl.constexpr, groups: tl.constexpr, GB: tl.constexpr):
    """As ``_field`` for the two low bits of elements S and S + 1, + 8, + 16, + 24 of each of two words."""
    at = words + 16 * groups + tl.arange(0, GB * 2)[None, :]
    x = _two(tl.load(at + (S * groups + first) * 2), GB)
    total = dot4(even[0] & MASK, x[0], tl.zeros_like(even[0]))
    total = dot4(even[1] & MASK, x[1], total)
    x = _two(tl.load(at + ((S + 1) * groups + first) * 2), GB)
    total = dot4(odd[0] & MASK, x[0], total)
    return dot4(odd[1] & MASK, x[1], total)


@triton.jit
def _int4_term(read, words, first, x_sum, groups: tl.constexpr, PLANES: tl.constexpr, GB: tl.constexpr):
    """[ROWS, GB] fp32: w of the groups ``first`` .. + GB, from what ``_int4_words`` read.

    A field is not shifted down before it is multiplied: its sum is a multiple of what it stands higher, and is shifted once.
    """
    middle: tl.constexpr = 0.0 if PLANES == 3 else (0.5 if PLANES == 2 else 1.5)
    planes, m, low, scale, zero = read
    h = _four(planes, GB)
    D = _field(h, words, first, 0x03030303, 0, groups, GB) << 2
    D += _field(h, words, first, 0x0C0C0C0C, 1, groups, GB)
    D += _field(h, words, first, 0x30303030, 2, groups, GB) >> 2
    D += _field(h, words, first, -0x3F3F3F40, 3, groups, GB) >> 4
    if PLANES > 1:
        # Bits b, b + 1 = 2 m + l of element b: of even b in `even`, of odd b (one place lower) in `odd`.
        even, odd = (m << 1) & -0x55555556, m & -0x55555556
        if PLANES > 2:
            even, odd = even | (low & 0x55555555), odd | ((low >> 1) & 0x55555555)
        evens, odds = _two(even, GB), _two(odd, GB)
        D += _pairs(evens, odds, words, first, 0x03030303, 0, groups, GB)
        D += _pairs(evens, odds, words, first, 0x0C0C0C0C, 2, groups, GB) >> 2
        D += _pairs(evens, odds, words, first, 0x30303030, 4, groups, GB) >> 4
        D += _pairs(evens, odds, words, first, -0x3F3F3F40, 6, groups, GB) >> 6
    scale = scale.to(tl.float32)
    return tl.fma(scale, to_float(D), (scale * middle - zero.to(tl.float32)) * x_sum)


@triton.jit
def _add(y, w, factors, first, groups: tl.constexpr, GB: tl.constexpr):
    """The chain ``y`` [ROWS, GB], the same in all lanes, GB groups further; ``factors`` [ROWS, 1] points to the scales of x."""
    lane = tl.arange(0, GB)[None, :]
    for k in tl.static_range(GB):
        each = factors + (first + k + tl.zeros_like(lane))
        # Beyond the last group a is 0: a chain stays as it is.
        a = tl.load(each) if groups % GB == 0 else tl.load(each, mask=first + k < groups, other=0.0)
        y = tl.fma(a, tl.broadcast_to(_lane(w, lane, k), a.shape), y)
    return y


@triton.jit
def _int8_step(
    y, y_up, blob, row, up_row, row_mask, words, g, scale_at, zero_at, codes_at, groups: tl.constexpr, BOTH: tl.constexpr
):
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
    factors = words.to(tl.pointer_type(tl.float32)) + 32 * groups
    lane = tl.arange(0, GB)[None, :]
    # Two steps are on their way while one is multiplied. Not unrolled further: the code must stay in the instruction cache.
    last: tl.constexpr = (groups - 1) // GB * GB
    now = _int4_words(blob, row, row_mask, 0, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, GB)
    then = _int4_words(blob, row, row_mask, min(GB, last), scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, GB)
    if BOTH:
        now_up = _int4_words(blob, up_row, row_mask, 0, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, GB)
        then_up = _int4_words(blob, up_row, row_mask, min(GB, last), scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, GB)
    for first in tl.range(0, groups, GB, loop_unroll_factor=2):
        x_sum = tl.load(factors + (groups + first + lane), mask=(first + lane < groups) & (row >= 0), other=0.0)
        ahead = tl.minimum(first + 2 * GB, last)
        later = _int4_words(blob, row, row_mask, ahead, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, GB)
        if BOTH:
            later_up = _int4_words(blob, up_row, row_mask, ahead, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, GB)
        y = _add(y, _int4_term(now, words, first, x_sum, groups, PLANES, GB), factors, first, groups, GB)
        now = then
        then = later
        if BOTH:
            y_up = _add(y_up, _int4_term(now_up, words, first, x_sum, groups, PLANES, GB), factors, first, groups, GB)
            now_up = then_up
            then_up = later_up
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
    ``width`` is the experts' inner size; PLANES 0 means unquantized, 8 one byte a code. Of quantized experts BN is 64: a program
    has a whole group of inner values. GB: groups at once.
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
                    blob + each, row, row + width, every, x + each, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, True,
                    BN, GB,
                )  # fmt: skip
            value = activate(gate, up, ACT)
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
