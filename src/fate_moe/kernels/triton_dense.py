"""The dense part of one decode step for a few tokens: matrix-vector products with their norms, and attention over a KV cache in
blocks. A token's numbers do not depend on those beside it.

Seven launches a layer where torch.compile leaves about twenty. Twins: the transformers modules they replace
(tests/layers/test_cuda_step.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_quantize import stage

__all__ = ["attend_kernel", "combine_kernel", "heads_kernel", "matvec_kernel", "place_kernel"]


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
    out_stride,
    gate_stride,
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
    """out[t, n] = f(weight[n] . x[t]), n < rows; ``x`` [tokens, cols], ``weight`` [rows, cols]. Grid (tokens, rows / BN):
    programs with the same weights are neighbours, so that one of them reads these from memory, and a token has a program of its
    own, so that its sums are the same in any company.

    CODES: ``weight`` is uint8 [rows, groups * 64] under ``scale`` and ``zero`` fp16 [rows, groups] (gpu/dense.py).
    NORM: x is RMS-normalized first (times ``norm`` [cols]; with ROUNDS it is rounded before that, with CENTERED its mean is taken
    off before, with NORM_BIAS ``norm_bias`` [cols] is added). BIAS: plus ``bias`` [rows]. SILU: ``weight`` has 2 * rows rows and
    out = silu(first half) * second half. GATE: times the shared gate's sigmoid (``gate``, a token's every ``gate_stride``).
    RESIDUAL: plus ``residual`` [tokens, rows]. STAGE: the first program of a token also writes the normalized x to ``normed``, and
    the second its staged form for the experts. Rounded to out's dtype where transformers rounds; a token's ``out`` begins every
    ``out_stride``.
    """
    kind: tl.constexpr = x.dtype.element_ty
    groups: tl.constexpr = (cols + 63) // 64
    token = tl.program_id(0)
    x += token * cols
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
    n = tl.program_id(1) * BN + tl.arange(0, BN)
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
                if tl.program_id(1) == 0:
                    tl.store(normed + token * cols + k, xs.to(kind), mask=k < cols)
                if tl.program_id(1) == 1:
                    stage(staged + token * (groups * 64), xs, start, groups, STAGE_PLANES, BK)
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
        total = total.to(kind).to(tl.float32) * tl.sigmoid(tl.load(gate + token * gate_stride).to(tl.float32))
    if RESIDUAL:
        total = total.to(kind).to(tl.float32)
        total += tl.load(residual + token * rows + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + n, total.to(out.dtype.element_ty), mask=n < rows)


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
    """A token's queries [Q], keys [K] and values [K] in place: the former two normalized over all heads together, all three
    clipped. Grid (3, tokens)."""
    kind: tl.constexpr = qkv.dtype.element_ty
    part = tl.program_id(0)
    at = qkv + tl.program_id(1) * (Q + 2 * K) + tl.where(part == 0, 0, Q + (part - 1) * K)
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
def place_kernel(
    qkv, q_norm, k_norm, inv_freq, position, table, live, queries, keys, values, eps, rope_scale, length, blocks,
    num_kv: tl.constexpr, group: tl.constexpr, NORM: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr,
    ROUNDS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Heads to where ``attend_kernel`` reads them. Grid (query, key and value heads, tokens), of which the first ``live`` int32 [1]
    tokens are there.

    ``qkv`` [tokens, heads, D]. Of a head's channels the first TURNED get rotary positions (``_head``), cos and sin times
    ``rope_scale``. ``keys`` and ``values`` [kv heads, length, D] are blocks of BLOCK positions; ``table`` int32 [tokens, blocks]
    says which block has a token's sequence's positions.
    """
    head, token = tl.program_id(0), tl.program_id(1)
    heads: tl.constexpr = num_kv * group
    at = tl.load(position + token)  # beside what it may not be needed for: neither load waits for the other
    if token < tl.load(live):
        d = tl.arange(0, D)[None, :]
        base = qkv + (token * (heads + 2 * num_kv) + head) * D + tl.zeros((1, 1), tl.int32)
        slot = tl.load(table + token * blocks + at // BLOCK) * BLOCK + (at % BLOCK).to(tl.int32)
        if head < heads:
            q = _head(base, q_norm, d, eps, at, inv_freq, rope_scale, NORM, D, TURNED, PAIRS, ROUNDS)
            tl.store(queries + (token * heads + head) * D + d, q.to(queries.dtype.element_ty))
        elif head < heads + num_kv:
            k = _head(base, k_norm, d, eps, at, inv_freq, rope_scale, NORM, D, TURNED, PAIRS, ROUNDS)
            tl.store(keys + ((head - heads) * length + slot).to(tl.int64) * D + d, k.to(keys.dtype.element_ty))
        else:
            v = tl.load(base + d)
            tl.store(values + ((head - heads - num_kv) * length + slot).to(tl.int64) * D + d, v.to(values.dtype.element_ty))


@triton.jit
def attend_kernel(
    queries,
    position,
    table,
    live,
    keys,
    values,
    most,
    sums,
    parts,
    scaling,
    length,
    blocks,
    num_kv: tl.constexpr,
    group: tl.constexpr,
    WINDOW: tl.constexpr,
    DOT: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BS: tl.constexpr,
):
    """Each token's query over a part of its sequence's keys and values: positions up to its own, in ascending order.

    Grid (kv heads, splits, tokens); see ``place_kernel`` for the cache. The query sees the WINDOW latest tokens (0: all). GP is
    the group's size, at least 16; products are made in DOT; CHUNK positions a split, BS (a divisor of BLOCK, which divides CHUNK)
    at once. Writes each split's maximum and sum of weights [tokens, heads, splits] and weighted values [.., D], fp32.
    """
    head, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    d = tl.arange(0, D)[None, :]
    i = tl.arange(0, GP)
    heads: tl.constexpr = num_kv * group
    at = tl.load(position + token).to(tl.int32)
    query = queries + (token * heads + head * group + tl.minimum(i, group - 1))[:, None] * D
    q = tl.load(query + d).to(DOT)  # [GP, D]
    if token < tl.load(live):
        top = tl.zeros((GP,), tl.float32) - float("inf")
        total = tl.zeros((GP,), tl.float32)
        acc = tl.zeros((GP, D), tl.float32)
        first = split * CHUNK
        begin, stop = first, tl.minimum(first + CHUNK, at + 1)
        low = 0
        if WINDOW > 0:
            low = tl.maximum(at - WINDOW + 1, 0)
            begin = first + tl.maximum(low - first, 0) // BS * BS
            stop = tl.where(low < first + CHUNK, stop, begin)  # no block without a token that is seen
        for start in range(begin, stop, BS):
            s = start + tl.arange(0, BS)
            slot = tl.load(table + token * blocks + start // BLOCK) * BLOCK + start % BLOCK + tl.arange(0, BS)
            here = (head * length + slot).to(tl.int64)[:, None] * D + d
            there = (s <= at)[:, None]
            k = tl.load(keys + here, mask=there, other=0.0)
            v = tl.load(values + here, mask=there, other=0.0)
            score = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee") * scaling  # [GP, BS]
            score = tl.where(((s <= at) & (s >= low))[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            p = tl.exp(score - higher[:, None])
            old_scale = tl.exp(top - higher)
            total = total * old_scale + tl.sum(p, axis=1)
            acc = tl.dot(p.to(DOT), v.to(DOT), acc * old_scale[:, None], input_precision="ieee")
            top = higher
        row = (token * heads + head * group + i) * splits + split
        tl.store(most + row, top, mask=i < group)
        tl.store(sums + row, total, mask=i < group)
        tl.store(parts + row[:, None] * D + d, acc, mask=(i < group)[:, None])


@triton.jit
def combine_kernel(most, sums, parts, sinks, live, out, splits, SINKS: tl.constexpr, D: tl.constexpr, SP: tl.constexpr):
    """The splits of each head together: ``out`` [tokens, heads * D]. With SINKS a head has another score of no value, ``sinks``
    [heads]. Grid (heads, tokens)."""
    if tl.program_id(1) < tl.load(live):
        head = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        s = tl.arange(0, SP)
        d = tl.arange(0, D)
        top = tl.load(most + head * splits + s, mask=s < splits, other=float("-inf"))
        highest = tl.max(top, axis=0)
        if SINKS:
            sink = tl.load(sinks + tl.program_id(0)).to(tl.float32)
            highest = tl.maximum(highest, sink)
        scale = tl.exp(top - highest)
        total = tl.sum(scale * tl.load(sums + head * splits + s, mask=s < splits, other=0.0), axis=0)
        if SINKS:
            total += tl.exp(sink - highest)
        part = tl.load(parts + (head * splits + s)[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
        tl.store(out + head * D + d, (tl.sum(part * scale[:, None], axis=0) / total).to(out.dtype.element_ty))
