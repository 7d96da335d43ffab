"""The dense part of one decode step for one token: matrix-vector products with their norms, and attention over a static KV cache.

Six launches a layer where torch.compile leaves about twenty. Twins: the transformers modules they replace
(tests/layers/test_cuda_step.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_quantize import stage

__all__ = ["attend_kernel", "combine_kernel", "heads_kernel", "matvec_kernel"]


@triton.jit
def _codes_dot(codes, scale, zero, n, n_mask, xs, start: tl.constexpr, groups: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BN]: rows ``n`` of byte codes times ``xs`` [BK], which is x from column ``start`` on and 0 beyond its end."""
    k = start + tl.arange(0, BK)
    g = start // 64 + tl.arange(0, BK // 64)
    row = n.to(tl.int64)[:, None]
    mask = n_mask[:, None] & (k < groups * 64)[None, :]
    q = tl.load(codes + row * (groups * 64) + k[None, :], mask=mask, other=0).to(tl.float32)
    dot = tl.sum(tl.reshape(q * xs[None, :], (BN, BK // 64, 64)), axis=2)
    x_sum = tl.sum(tl.reshape(xs, (BK // 64, 64)), axis=1)
    mask = n_mask[:, None] & (g < groups)[None, :]
    s = tl.load(scale + row * groups + g[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(zero + row * groups + g[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(s * dot - z * x_sum[None, :], axis=1)


@triton.jit
def matvec_kernel(
    x,
    norm,
    norm_bias,
    weight,
    scale,
    zero,
    bias,
    residual,
    gate,
    normed,
    staged,
    out,
    eps,
    cols: tl.constexpr,
    rows: tl.constexpr,
    CODES: tl.constexpr,
    NORM: tl.constexpr,
    ROUNDS: tl.constexpr,
    CENTERED: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    SILU: tl.constexpr,
    STAGE: tl.constexpr,
    STAGE_PLANES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[n] = f(weight[n] . x), n < rows; ``x`` [cols], ``weight`` [rows, cols]. Grid (rows / BN).

    CODES: ``weight`` is uint8 [rows, groups * 64] under ``scale`` and ``zero`` fp16 [rows, groups] (gpu/dense.py).
    NORM: x is RMS-normalized first (times ``norm`` [cols]; with ROUNDS it is rounded before that, with CENTERED its mean is taken
    off before, with NORM_BIAS ``norm_bias`` [cols] is added). BIAS: plus ``bias`` [rows]. SILU: ``weight`` has 2 * rows rows and
    out = silu(first half) * second half. GATE: times the shared gate's sigmoid (``gate`` [1]). RESIDUAL: plus ``residual`` [rows].
    STAGE: program 0 also writes the normalized x to ``normed``, and program 1 its staged form for the experts. Rounded to out's
    dtype where transformers rounds.
    """
    kind: tl.constexpr = x.dtype.element_ty
    groups: tl.constexpr = (cols + 63) // 64
    rstd = 1.0
    mean = 0.0
    if CENTERED:
        sums = tl.zeros((BK,), tl.float32)
        for start in tl.static_range(0, cols, BK):
            k = start + tl.arange(0, BK)
            sums += tl.load(x + k, mask=k < cols, other=0.0).to(tl.float32)
        mean = tl.sum(sums, axis=0) / cols
    if NORM:
        squares = tl.zeros((BK,), tl.float32)
        for start in tl.static_range(0, cols, BK):
            k = start + tl.arange(0, BK)
            part = tl.load(x + k, mask=k < cols, other=0.0).to(tl.float32)
            if CENTERED:
                part = tl.where(k < cols, part - mean, 0.0)
            squares += part * part
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / cols + eps)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    second = tl.zeros((BN,), tl.float32)
    for start in tl.static_range(0, cols, BK):
        k = start + tl.arange(0, BK)
        xs = tl.load(x + k, mask=k < cols, other=0.0).to(tl.float32)
        if NORM:
            factor = tl.load(norm + k, mask=k < cols, other=0.0).to(tl.float32)
            if CENTERED:
                xs = tl.where(k < cols, xs - mean, 0.0)
            xs = xs * rstd
            if ROUNDS:
                xs = xs.to(kind).to(tl.float32)
            xs = xs * factor
            if NORM_BIAS:
                xs += tl.load(norm_bias + k, mask=k < cols, other=0.0).to(tl.float32)
            xs = xs.to(kind).to(tl.float32)
            if STAGE:
                if tl.program_id(0) == 0:
                    tl.store(normed + k, xs.to(kind), mask=k < cols)
                if tl.program_id(0) == 1:
                    stage(staged, xs, start, groups, STAGE_PLANES, BK)
        at = n[:, None] * cols + k[None, :]
        if CODES:
            total += _codes_dot(weight, scale, zero, n, n < rows, xs, start, groups, BN, BK)
            if SILU:
                second += _codes_dot(weight, scale, zero, n + rows, n < rows, xs, start, groups, BN, BK)
        elif cols % BK == 0 and rows % BN == 0:
            w = tl.load(weight + at).to(tl.float32)
            total += tl.sum(w * xs[None, :], axis=1)
            if SILU:
                w = tl.load(weight + rows * cols + at).to(tl.float32)
                second += tl.sum(w * xs[None, :], axis=1)
        else:
            mask = (n < rows)[:, None] & (k < cols)[None, :]
            w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(w * xs[None, :], axis=1)
            if SILU:
                w = tl.load(weight + rows * cols + at, mask=mask, other=0.0).to(tl.float32)
                second += tl.sum(w * xs[None, :], axis=1)
    if BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    if SILU:
        total = total.to(kind).to(tl.float32)
        total = (total * tl.sigmoid(total)).to(kind).to(tl.float32) * second.to(kind).to(tl.float32)
    if GATE:
        total = total.to(kind).to(tl.float32) * tl.sigmoid(tl.load(gate).to(tl.float32))
    if RESIDUAL:
        total = total.to(kind).to(tl.float32) + tl.load(residual + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < rows)


@triton.jit
def _head(
    base, norm, d, eps, position, inv_freq, rope_scale, NORM: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr,
    PAIRS: tl.constexpr, ROUNDS: tl.constexpr
):  # fmt: skip
    """Heads ``base`` [rows, 1] + d [1, D], normalized, their first TURNED channels turned by rotary position, in fp32; rounded
    where transformers does.

    Channels i and i + TURNED / 2 turn together, with PAIRS 2 i and 2 i + 1; with ROUNDS cos and sin are rounded.
    """
    kind: tl.constexpr = base.dtype.element_ty
    half: tl.constexpr = TURNED // 2
    if PAIRS:
        first, angle_of = d % 2 == 0, d // 2
        other = tl.where(first, d + 1, d - 1)
    else:
        first, angle_of = d < half, d % half
        other = tl.where(first, d + half, d - half)
    other = tl.where(d < TURNED, other, d)
    angle_of = tl.where(d < TURNED, angle_of, 0)
    value = tl.load(base + d).to(tl.float32)
    turned = tl.load(base + other).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(value * value, axis=1)[:, None] / D + eps)
        value = ((value * rstd).to(kind).to(tl.float32) * tl.load(norm + d).to(tl.float32)).to(kind).to(tl.float32)
        turned = ((turned * rstd).to(kind).to(tl.float32) * tl.load(norm + other).to(tl.float32)).to(kind).to(tl.float32)
    angle = position.to(tl.float32) * tl.load(inv_freq + angle_of)
    cos = tl.cos(angle) * rope_scale
    sin = tl.sin(angle) * rope_scale
    if ROUNDS:
        cos = cos.to(kind).to(tl.float32)
        sin = sin.to(kind).to(tl.float32)
    turned = value * cos + tl.where(first, -turned, turned) * sin
    return tl.where(d < TURNED, turned, value).to(kind).to(tl.float32)


@triton.jit
def heads_kernel(
    qkv, q_norm, k_norm, eps, clip, Q: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Queries [Q], keys [K] and values [K] in place: the former two normalized over all heads together, all three clipped. Grid
    (3)."""
    kind: tl.constexpr = qkv.dtype.element_ty
    part = tl.program_id(0)
    at = qkv + tl.where(part == 0, 0, Q + (part - 1) * K)
    n = tl.where(part == 0, Q, K)
    i = tl.arange(0, BLOCK)
    value = tl.load(at + i, mask=i < n, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.load(q_norm + i, mask=(i < n) & (part == 0), other=0.0).to(tl.float32)
        factor += tl.load(k_norm + i, mask=(i < n) & (part == 1), other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(value * value, axis=0) / n + eps)
        normed = ((value * rstd).to(kind).to(tl.float32) * factor).to(kind).to(tl.float32)
        value = tl.where(part < 2, normed, value)
    if CLIP:
        value = tl.minimum(tl.maximum(value, -clip), clip)
    tl.store(at + i, value.to(kind), mask=i < n)


@triton.jit
def attend_kernel(
    qkv,
    q_norm,
    k_norm,
    inv_freq,
    position,
    keys,
    values,
    most,
    sums,
    parts,
    eps,
    scaling,
    rope_scale,
    length,
    num_kv: tl.constexpr,
    group: tl.constexpr,
    NORM: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROUNDS: tl.constexpr,
    WINDOW: tl.constexpr,
    DOT: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    CHUNK: tl.constexpr,
    BS: tl.constexpr,
):
    """One query token over a part of the cache; the part that holds ``position`` also appends the new key and value.

    Grid (kv heads, splits); ``qkv`` [(group + 2) * kv heads * D], ``keys``/``values`` [kv heads, length, D], ``position`` int64
    [1]. Of a head's channels the first TURNED have rotary positions (``_head``), cos and sin times ``rope_scale``. The query sees
    the WINDOW latest tokens (0: all). GP is the group's size, at least 16; products are made in DOT. Writes each split's maximum
    and sum of weights [heads, splits] and weighted values [heads, splits, D], fp32.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    at = tl.load(position)
    d = tl.arange(0, D)[None, :]
    i = tl.arange(0, GP)
    query = qkv + (head * group + tl.minimum(i, group - 1))[:, None] * D
    q = _head(query, q_norm, d, eps, at, inv_freq, rope_scale, NORM, D, TURNED, PAIRS, ROUNDS).to(DOT)  # [GP, D]
    heads: tl.constexpr = num_kv * group
    one = tl.zeros((1, 1), tl.int32)
    k_new = _head(
        qkv + (heads + head) * D + one, k_norm, d, eps, at, inv_freq, rope_scale, NORM, D, TURNED, PAIRS, ROUNDS
    )  # [1, D]
    v_new = tl.load(qkv + (heads + num_kv + head) * D + d).to(tl.float32)
    kind: tl.constexpr = keys.dtype.element_ty
    top = tl.zeros((GP,), tl.float32) - float("inf")
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, D), tl.float32)
    first = split * CHUNK
    begin, stop = first, tl.minimum(first + CHUNK, (at + 1).to(tl.int32))
    if WINDOW > 0:
        low = tl.maximum(at - WINDOW + 1, 0).to(tl.int32)
        begin = first + tl.maximum(low - first, 0) // BS * BS
        stop = tl.where(low < first + CHUNK, stop, begin)  # no block without a token that is seen
    for start in range(begin, stop, BS):
        s = start + tl.arange(0, BS)
        here = (head * length + s)[:, None] * D + d
        mine = s < first + CHUNK
        old = (mine & (s < at))[:, None]
        new = (mine & (s == at))[:, None]
        k = tl.load(keys + here, mask=old, other=0.0).to(tl.float32) + tl.where(new, k_new, 0.0)
        v = tl.load(values + here, mask=old, other=0.0).to(tl.float32) + tl.where(new, v_new, 0.0)
        tl.store(keys + here, (k_new + tl.zeros((BS, 1), tl.float32)).to(kind), mask=new)
        tl.store(values + here, (v_new + tl.zeros((BS, 1), tl.float32)).to(kind), mask=new)
        score = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee") * scaling  # [GP, BS]
        seen = mine & (s <= at)
        if WINDOW > 0:
            seen = seen & (s >= low)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp(score - higher[:, None])
        old_scale = tl.exp(top - higher)
        total = total * old_scale + tl.sum(p, axis=1)
        acc = tl.dot(p.to(DOT), v.to(DOT), acc * old_scale[:, None], input_precision="ieee")
        top = higher
    row = (head * group + i) * splits + split
    tl.store(most + row, top, mask=i < group)
    tl.store(sums + row, total, mask=i < group)
    tl.store(parts + row[:, None] * D + d, acc, mask=(i < group)[:, None])


@triton.jit
def combine_kernel(most, sums, parts, sinks, out, splits, SINKS: tl.constexpr, D: tl.constexpr, SP: tl.constexpr):
    """The splits of each head together: ``out`` [heads * D]. With SINKS a head has another score of no value, ``sinks`` [heads].
    Grid (heads)."""
    head = tl.program_id(0)
    s = tl.arange(0, SP)
    d = tl.arange(0, D)
    top = tl.load(most + head * splits + s, mask=s < splits, other=float("-inf"))
    highest = tl.max(top, axis=0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    scale = tl.exp(top - highest)
    total = tl.sum(scale * tl.load(sums + head * splits + s, mask=s < splits, other=0.0), axis=0)
    if SINKS:
        total += tl.exp(sink - highest)
    part = tl.load(parts + (head * splits + s)[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
    tl.store(out + head * D + d, (tl.sum(part * scale[:, None], axis=0) / total).to(out.dtype.element_ty))
