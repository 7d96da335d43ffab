"""Decode on the GPU: the chosen experts' MLP for a few tokens, straight from their slots in the VRAM pool, in two launches.

Twin: ``kernels/reference.py: expert_mlp``, expert by expert. Weights are never written out dequantized.

int4: a thread owns one group of 64 codes of one row. It holds the group's h plane as four 32-bit words and its m and l planes as
two words each, and makes *two* codes at once: elements 32 places apart in m and l sit 16 bits apart, so one shift and one mask
bring both into the halves of one register; OR 0x4300 makes each half the bf16 number 128 + q, which as the upper half of a
register is the same number in fp32: about 3.5 integer operations and one product per weight. Scale and zero come once per group:
sum((scale * q - zero) * x) = scale * sum(q * x) - zero * sum(x), and with EXACT the 128 is taken off each weight, else off the
sum: an error of 1e-6, nothing beside bf16 activations (4e-3), for a seventh of the instructions.

Activations are *staged*: fp32 in the order in which threads ask for them, [16 (4j + c), groups, 4 (w)] for element 64g + 16j + 4w
+ c, so that a warp's load of one (j, c) is 512 contiguous bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["down_kernel", "gate_up_kernel", "stage_token", "staged_index"]


@triton.jit
def staged_index(element, groups: tl.constexpr, PLANES: tl.constexpr):
    """Where element ``64g + 16j + 4w + c`` of an activation lies in its staged form (for weights without planes: where it was)."""
    if PLANES == 0 or PLANES == 8:
        return element
    g = element // 64
    j = element % 64 // 16
    w = element % 16 // 4
    c = element % 4
    return ((4 * j + c) * groups + g) * 4 + w


@triton.jit
def stage_token(hidden, staged, token, cols: tl.constexpr, groups: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """Write the staged form of row ``token`` of ``hidden`` [T, cols]; what pads the last group is 0."""
    for start in tl.static_range(0, groups * 64, BLOCK):
        element = start + tl.arange(0, BLOCK)
        value = tl.load(hidden + token * cols + element, mask=element < cols, other=0.0).to(tl.float32)
        place = token * (groups * 64) + staged_index(element, groups, PLANES)
        tl.store(staged + place, value, mask=element < groups * 64)


@triton.jit
def _int4_groups(
    blob,
    row,
    row_mask,
    x,
    start,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    groups: tl.constexpr,
    PLANES: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    GB: tl.constexpr,
):
    """GB groups' part of ``_int4_dot``, from group ``start`` on."""
    # A code cut short stands for the middle of its bin: 0.5 above the 3-bit view's lower edge, 1.5 above the 2-bit view's.
    off: tl.constexpr = 128.0 if PLANES == 3 else (127.5 if PLANES == 2 else 126.5)
    g = start + tl.arange(0, GB)[:, None]
    word = start * 4 + tl.arange(0, GB * 4)[:, None]
    if groups % GB == 0:
        mask = row_mask
        word_mask = row_mask
        x_mask = word >= 0
    else:
        mask = row_mask & (g < groups)
        x_mask = word < groups * 4
        word_mask = row_mask & x_mask
    at = row * groups + g  # [GB, ROWS]: which group of the matrix
    h = tl.load((blob + h_at).to(tl.pointer_type(tl.uint32)) + (row * (groups * 4) + word), mask=word_mask, other=0)
    h = tl.reshape(h, (GB, 4, ROWS))
    if PLANES > 1:
        m_words = (blob + m_at).to(tl.pointer_type(tl.uint32)) + at * 2
        m0 = tl.load(m_words, mask=mask, other=0)  # elements 0..31 of the group
        m1 = tl.load(m_words + 1, mask=mask, other=0)
    if PLANES > 2:
        l_words = (blob + l_at).to(tl.pointer_type(tl.uint32)) + at * 2
        l0 = tl.load(l_words, mask=mask, other=0)
        l1 = tl.load(l_words + 1, mask=mask, other=0)
        # Bits b, b + 1 = 2m + l of element b: of even b in `even`, of odd b (one place lower) in `odd`.
        even0, odd0 = ((m0 << 1) & 0xAAAAAAAA) | (l0 & 0x55555555), (m0 & 0xAAAAAAAA) | ((l0 >> 1) & 0x55555555)
        even1, odd1 = ((m1 << 1) & 0xAAAAAAAA) | (l1 & 0x55555555), (m1 & 0xAAAAAAAA) | ((l1 >> 1) & 0x55555555)
    elif PLANES > 1:
        even0, odd0 = (m0 << 1) & 0xAAAAAAAA, m0 & 0xAAAAAAAA
        even1, odd1 = (m1 << 1) & 0xAAAAAAAA, m1 & 0xAAAAAAAA
    scale = tl.load((blob + scale_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load((blob + zero_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.arange(0, 4)[None, :, None]
    dot = tl.zeros((GB, 4, ROWS), tl.float32)
    x_sum = tl.zeros((GB, 4, 1), tl.float32)
    for c in tl.static_range(4):
        u = ((h << 2) if c == 0 else (h >> (8 * c - 2))) & 0x3FC
        t = u | (u << 14)  # h of j = 0 and 1 at bits 2 and 18, of j = 2 and 3 four places higher
        q01 = (t & 0x000C000C) | 0x43004300
        q23 = ((t >> 4) & 0x000C000C) | 0x43004300
        if PLANES > 1:
            shift = (4 * w + c // 2 * 2).to(tl.uint32)
            if c % 2 == 0:
                q01 |= (even0[:, None, :] >> shift) & 0x00030003
                q23 |= (even1[:, None, :] >> shift) & 0x00030003
            else:
                q01 |= (odd0[:, None, :] >> shift) & 0x00030003
                q23 |= (odd1[:, None, :] >> shift) & 0x00030003
        for j in tl.static_range(4):
            q = q01 if j < 2 else q23
            half = (q << 16) if j % 2 == 0 else (q & 0xFFFF0000)
            xs = _staged_tile(x, (4 * j + c) * groups * 4 + word, x_mask, GB)
            value = half.to(tl.float32, bitcast=True)
            if EXACT:
                value -= off
            dot += value * xs
            x_sum += xs
    if not EXACT:
        dot -= off * x_sum
    return tl.sum(scale * tl.sum(dot, axis=1) - zero * tl.sum(x_sum, axis=1), axis=0)


@triton.jit
def _int4_dot(
    blob,
    row,
    row_mask,
    x,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    groups: tl.constexpr,
    PLANES: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    GB: tl.constexpr,
):
    """[ROWS] fp32: rows ``row`` [1, ROWS] of a matrix of planes 2+1+1 times the staged activation at ``x``.

    ``blob`` points to the first byte of the rows' blob; it and ``x`` are one pointer, or one per row [1, ROWS]. Groups are the
    first dimension of every tile: where nothing else decides, Triton lets the first one run along the threads of a warp.
    """
    total = tl.zeros((ROWS,), tl.float32)
    if groups <= 16 * GB:
        for start in tl.static_range(0, groups, GB):
            total += _int4_groups(
                blob, row, row_mask, x, start, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, EXACT, ROWS, GB
            )
    else:  # unrolled, the 56 steps of Mixtral's down would take minutes to compile
        for start in range(0, groups, GB):
            total += _int4_groups(
                blob, row, row_mask, x, start, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, EXACT, ROWS, GB
            )
    return total


@triton.jit
def _staged_tile(x, place, mask, GB: tl.constexpr):
    """[GB, 4, 1] (or ROWS, as ``x`` has): four neighbouring elements of each of GB groups."""
    values = tl.load(x + place, mask=mask, other=0.0)
    return tl.reshape(values, (GB, 4, values.shape[1]))


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
    """As ``_int4_dot`` for unquantized rows of ``cols`` numbers of ``DTYPE``; ``x`` is then in plain order, padded to whole
    groups."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, groups * 64, GB * 64):
        element = start + tl.arange(0, GB * 64)[:, None]
        xs = tl.load(x + element, mask=element < cols, other=0.0)
        weights = (blob + weight_at).to(tl.pointer_type(DTYPE)) + row * cols + element
        total += tl.sum(tl.load(weights, mask=row_mask & (element < cols), other=0.0).to(tl.float32) * xs, axis=0)
    return total


@triton.jit
def _int8_dot(
    blob,
    row,
    row_mask,
    x,
    scale_at,
    zero_at,
    codes_at,
    groups: tl.constexpr,
    ROWS: tl.constexpr,
    GB: tl.constexpr,
):
    """As ``_int4_dot`` for rows of one byte a code; ``x`` is in plain order, padded to whole groups."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, groups, GB):
        g = start + tl.arange(0, GB)[:, None]
        element = start * 64 + tl.arange(0, GB * 64)[:, None]
        inside = element < groups * 64
        xs = tl.load(x + element, mask=inside, other=0.0)  # [GB * 64, 1 or ROWS]
        codes = tl.load(blob + codes_at + row * (groups * 64) + element, mask=row_mask & inside, other=0).to(tl.float32)
        at = row * groups + g
        mask = row_mask & (g < groups)
        scale = tl.load((blob + scale_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load((blob + zero_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
        dot = tl.sum(tl.reshape(codes * xs, (GB, 64, ROWS)), axis=1)
        x_sum = tl.sum(tl.reshape(xs, (GB, 64, xs.shape[1])), axis=1)
        total += tl.sum(scale * dot - zero * x_sum, axis=0)
    return total


@triton.jit
def _activate(gate, up, ACT: tl.constexpr):
    if ACT == "silu":
        return gate * tl.sigmoid(gate) * up
    return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up  # gelu


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
    EXACT: tl.constexpr,
    ACT: tl.constexpr,
    PHASE: tl.constexpr,
    BN: tl.constexpr,
    GB: tl.constexpr,
):
    """inner[r] = act(gate(x)) * up(x), staged, for choice row r = token * top_k + choice. Grid (choice rows, width / BN).

    ``slots`` int32 [rows], -1 where a row has no expert (its inner is 0); ``pending`` int32 [rows]: PHASE 0 computes the rows whose
    expert is there, 1 those whose expert is being copied when the residency step ends, 2 all (above 1: the host computes them).
    ``width`` is the experts' inner size; PLANES 0 means unquantized, 8 one byte a code.
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
            i = tl.arange(0, 2 * BN)[None, :]
            place = tl.program_id(1) * BN + i % BN
            row = tl.where(i < BN, place, place + width)  # gate rows, then up rows
            x = staged + (r // top_k) * (groups * 64)
            if PLANES == 0:
                y = _dense_dot(blob, row, place < width, x, scale_at, cols, groups, DTYPE, 2 * BN, GB)
            elif PLANES == 8:
                y = _int8_dot(blob, row, place < width, x, scale_at, zero_at, h_at, groups, 2 * BN, GB)
            else:
                y = _int4_dot(blob, row, place < width, x, scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, EXACT, 2 * BN, GB)
            gate, up = tl.split(tl.trans(tl.reshape(y, (2, BN))))
            value = _activate(gate, up, ACT)
        else:
            value = tl.zeros((BN,), tl.float32)
        value = tl.where(n < width, value, 0.0)
        tl.store(inner + r * (inner_groups * 64) + staged_index(n, inner_groups, PLANES), value, mask=n < inner_groups * 64)


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
    EXACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HOST: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    GB: tl.constexpr,
):
    """out[t] = sum over choices of routing weight times down(inner): no atomics, one order of summation. Grid (tokens, cols / BN).

    One tile holds BN output rows of all ``top_k`` experts (KP is the next power of two). ``out`` [T, cols] in its own dtype; with
    RESIDUAL plus ``residual`` [T, cols], which it may be. With HOST the rows with ``pending`` 2 or more are taken as they are from
    ``outside`` fp32 [rows, cols].
    """
    token = tl.program_id(0)
    inner_groups: tl.constexpr = (width + 63) // 64
    i = tl.arange(0, KP * BN)[None, :]
    choice = i // BN
    row = tl.program_id(1) * BN + i % BN
    chosen = choice < top_k
    slot = tl.load(slots + token * top_k + choice, mask=chosen, other=-1)
    mask = (slot >= 0) & (row < cols)
    blob = pool + tl.maximum(slot, 0).to(tl.int64) * slot_bytes
    x = inner + (token * top_k + tl.minimum(choice, top_k - 1)) * (inner_groups * 64)
    if PLANES == 0:
        y = _dense_dot(blob, row, mask, x, scale_at, width, inner_groups, DTYPE, KP * BN, GB)
    elif PLANES == 8:
        y = _int8_dot(blob, row, mask, x, scale_at, zero_at, h_at, inner_groups, KP * BN, GB)
    else:
        y = _int4_dot(blob, row, mask, x, scale_at, zero_at, h_at, m_at, l_at, inner_groups, PLANES, EXACT, KP * BN, GB)
    k = tl.arange(0, KP)
    routed = tl.load(routing_weights + token * top_k + k, mask=k < top_k, other=0.0).to(tl.float32)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    y = tl.reshape(y, (KP, BN))
    if HOST:
        r = token * top_k + k
        elsewhere = tl.load(pending + r, mask=k < top_k, other=0) > 1
        y += tl.load(outside + r[:, None] * cols + n[None, :], mask=elsewhere[:, None] & (n < cols)[None, :], other=0.0)
    total = tl.sum(y * routed[:, None], axis=0)
    if RESIDUAL:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + token * cols + n, mask=n < cols, other=0.0).to(tl.float32)
    tl.store(out + token * cols + n, total.to(out.dtype.element_ty), mask=n < cols)
