"""Prompts on the GPU: many tokens through quantized experts, on int8 tensor cores.

Twins: ``reference.linear_quantized`` and ``reference.expert_mlp``, to the bit. A *tile* is up to BM choice rows of one expert, so
experts of any popularity share one launch. For each group of 64 columns one integer product [BN weights, 64] x [64, BM tokens] is
made, whose sums are exact, and added to the chain of each output in registers: a row's bits depend on nothing but its own values.

Planes become bytes in registers, a shift and a mask for four of them: the 2-bit plane with its elements in their order, and the two
1-bit planes together in the second order of ``store_codes``. Each is a product of its own, with activations in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_activations import activate
from fate_moe.kernels.triton_quantize import ASM, halves, quantize_groups, store_codes

__all__ = ["combine_kernel", "down_prompt_kernel", "gate_up_prompt_kernel"]


@triton.jit
def _bytes(words, BN: tl.constexpr):
    """int8 [BN, 64]: the bytes of ``words`` int32 [BN, 16]. With ASM a thread must hold all four of a word. It does in the layout
    of a product's left operand, which Triton carries back to here if the steps between are a join, a broadcast or constant."""
    words = tl.reshape(tl.broadcast_to(words[:, :, None], (BN, 16, 4)), (BN, 64))
    if ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [words], tl.int8, True, 4)
    return ((words >> (tl.arange(0, 64)[None, :] % 4 * 8)) & 255).to(tl.int8)


@triton.jit
def _fields(f0, f1, f2, f3, BN: tl.constexpr):
    """``_bytes`` of the words [BN, 4] each of f0, f1, f2 and f3, one after the other."""
    return _bytes(tl.reshape(tl.permute(tl.join(tl.join(f0, f1), tl.join(f2, f3)), (0, 3, 2, 1)), (BN, 16)), BN)


@triton.jit
def _high(h, BN: tl.constexpr):
    """int8 [BN, 64]: four times the codes of a 2-bit plane's words ``h`` [BN, 4], elements in their order."""
    mask: tl.constexpr = 0x0C0C0C0C
    return _fields((h << 2) & mask, h & mask, (h >> 2) & mask, (h >> 4) & mask, BN)


@triton.jit
def _low(m, low, PLANES: tl.constexpr, BN: tl.constexpr):
    """int8 [BN, 64]: 2 m + l of the 1-bit planes' words [BN, 2], elements in the second order of ``store_codes``."""
    mask: tl.constexpr = 0x03030303
    t = tl.arange(0, 4)[None, :]
    m = tl.reshape(tl.broadcast_to(m[:, :, None], (BN, 2, 2)), (BN, 4))
    pairs = (m << (1 - t % 2)) & -0x55555556  # 2 m + l of the even elements of half t // 2, or of the odd ones
    if PLANES > 2:
        low = tl.reshape(tl.broadcast_to(low[:, :, None], (BN, 2, 2)), (BN, 4))
        pairs = pairs | ((low >> (t % 2)) & 0x55555555)
    return _fields(pairs & mask, (pairs >> 2) & mask, (pairs >> 4) & mask, (pairs >> 6) & mask, BN)


@triton.jit
def _groups(
    y,
    h,
    m,
    low,
    scale,
    zero,
    a,
    x_sum,
    x_at,
    token_mask,
    PLANES: tl.constexpr,
    GB: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """The chains ``y`` [BN, BM] GB groups further. Columns of all others belong to the groups; ``x_at`` [64, BM] points to the
    codes of the first."""
    wide: tl.constexpr = 64 if PLANES == 8 else 128
    if GB > 1:
        half: tl.constexpr = GB // 2
        h, h_next = halves(h)
        m, m_next = halves(m)
        low, low_next = halves(low)
        scale, scale_next = halves(scale)
        zero, zero_next = halves(zero)
        a, a_next = halves(a)
        x_sum, x_sum_next = halves(x_sum)
        y = _groups(y, h, m, low, scale, zero, a, x_sum, x_at, token_mask, PLANES, half, BN, BM)
        y = _groups(
            y,
            h_next,
            m_next,
            low_next,
            scale_next,
            zero_next,
            a_next,
            x_sum_next,
            x_at + half * wide,
            token_mask,
            PLANES,
            half,
            BN,
            BM,
        )
    else:
        # A byte's code is counted from 128; a code cut short stands for the middle of its bin.
        middle: tl.constexpr = 0.5 if PLANES == 2 else (1.5 if PLANES == 1 else 0.0)
        a, x_sum = tl.trans(a), tl.trans(x_sum)
        x = tl.load(x_at, mask=token_mask, other=0)
        if PLANES == 8:
            D = tl.dot(_bytes(h ^ -0x7F7F7F80, BN), x, out_dtype=tl.int32)
            D += (x_sum * 128.0).to(tl.int32)
        else:
            D = tl.dot(_high(h, BN), x, out_dtype=tl.int32)
            if PLANES > 1:
                x = tl.load(x_at + 64, mask=token_mask, other=0)
                D = tl.dot(_low(m, low, PLANES, BN), x, acc=D, out_dtype=tl.int32)
        scale = scale.to(tl.float32)
        offset = (scale * middle - zero.to(tl.float32)) * x_sum
        y = tl.fma(tl.broadcast_to(a, (BN, BM)), tl.fma(tl.broadcast_to(scale, (BN, BM)), D.to(tl.float32), offset), y)
    return y


@triton.jit
def _product(
    blob,
    row,
    row_mask,
    codes,
    scales,
    sums,
    token,
    token_mask,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    groups: tl.constexpr,
    PLANES: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    GB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BN, BM] fp32: rows ``row`` [BN] of a matrix in ``blob`` times activations ``token`` [BM]. GB groups are read at once."""
    wide: tl.constexpr = 64 if PLANES == 8 else 128
    y = tl.zeros((BN, BM), tl.float32)
    x_at = codes + token.to(tl.int64)[None, :] * (groups * wide) + tl.arange(0, 64)[:, None]
    row, token, row_mask = row[:, None], token[:, None], row_mask[:, None]
    g = tl.arange(0, GB)[None, :]
    for first in tl.range(0, groups, GB, num_stages=STAGES):
        at = row * groups + first
        rows_here, tokens_here = row_mask, token_mask[:, None]
        if groups % GB != 0:
            rows_here, tokens_here = row_mask & (first + g < groups), token_mask[:, None] & (first + g < groups)
        scale = tl.load((blob + scale_at).to(tl.pointer_type(tl.float16)) + at + g, mask=rows_here, other=0.0)
        zero = tl.load((blob + zero_at).to(tl.pointer_type(tl.float16)) + at + g, mask=rows_here, other=0.0)
        a = tl.load(scales + token * groups + first + g, mask=tokens_here, other=0.0)
        x_sum = tl.load(sums + token * groups + first + g, mask=tokens_here, other=0.0)
        h = _words(blob + h_at, at, row_mask, first, groups, GB, 16 if PLANES == 8 else 4)
        m = _words(blob + m_at, at, row_mask, first, groups, GB, 2) if PLANES == 2 or PLANES == 3 else h
        low = _words(blob + l_at, at, row_mask, first, groups, GB, 2) if PLANES == 3 else h
        y = _groups(y, h, m, low, scale, zero, a, x_sum, x_at + first * wide, token_mask[None, :], PLANES, GB, BN, BM)
    return y


@triton.jit
def _words(plane, at, mask, first, groups: tl.constexpr, GB: tl.constexpr, N: tl.constexpr):
    """int32 [BN, N GB]: the N words each of the GB groups from ``at`` [BN, 1], the ``first`` of a row's ``groups``, on."""
    n = tl.arange(0, GB * N)[None, :]
    if groups % GB != 0:
        mask = mask & (first + n // N < groups)
    return tl.load(plane.to(tl.pointer_type(tl.int32)) + at * N + n, mask=mask, other=0)


@triton.jit
def _bias(blob, row, mask, BIAS_AT: tl.constexpr, BIAS: tl.constexpr):
    """[BN, 1] fp32: the biases of rows ``row`` [BN]."""
    return tl.load((blob + BIAS_AT).to(tl.pointer_type(BIAS)) + row, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def gate_up_prompt_kernel(
    pool,
    tiles,
    order,
    codes,
    scales,
    sums,
    inner,
    inner_scales,
    inner_sums,
    slot_bytes,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    top_k: tl.constexpr,
    cols: tl.constexpr,
    width: tl.constexpr,
    PLANES: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    MIXED: tl.constexpr,
    BIAS_AT: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    GB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """act(gate(x)) * up(x), quantized. Grid (tiles, width / 64).

    ``tiles`` int32 [.., 3]: slot, first place in ``order``, number of rows (at most BM; 0: no tile). ``order`` int64 [choices]
    sorts choices (token * top_k + choice) by expert. ``codes``, ``scales``, ``sums`` of tokens are as
    ``quantize_rows_kernel`` makes them, and so are ``inner``, ``inner_scales``, ``inner_sums`` of choices. The others are as in
    ``triton_experts.gate_up_kernel``.
    """
    tile = tiles + 3 * tl.program_id(0)
    count = tl.load(tile + 2)
    if count == 0:
        return
    groups: tl.constexpr = (cols + 63) // 64
    inner_groups: tl.constexpr = (width + 63) // 64
    blob = pool + tl.load(tile).to(tl.int64) * slot_bytes
    i = tl.arange(0, BM)
    valid = i < count
    choice = tl.load(order + tl.load(tile + 1) + i, mask=valid, other=0).to(tl.int32)
    r = tl.arange(0, 128)
    place = tl.program_id(1) * 64 + r // 2
    row = 2 * place + r % 2 if MIXED else tl.where(r % 2 == 0, place, place + width)  # a gate row, then its up row
    y = _product(
        blob, row, place < width, codes, scales, sums, choice // top_k, valid, scale_at, zero_at, h_at, m_at, l_at,
        groups, PLANES, 128, BM, GB, STAGES,
    )  # fmt: skip
    if BIAS_AT >= 0:
        y += _bias(blob, row, place < width, BIAS_AT, BIAS)
    gate, up = tl.split(tl.permute(tl.reshape(y, (64, 2, BM)), (2, 0, 1)))  # [BM, 64]
    n = tl.program_id(1) * 64 + tl.arange(0, 64)
    value = tl.where((n < width)[None, :], activate(gate, up, ACT, ALPHA, LIMIT, OFFSET), 0.0)
    made, scale, total = quantize_groups(value)
    wide: tl.constexpr = 64 if PLANES == 8 else 128
    at = choice[:, None]
    store_codes(inner + at.to(tl.int64) * (inner_groups * wide) + tl.program_id(1) * wide, made, valid[:, None], PLANES)
    tl.store(inner_scales + at * inner_groups + tl.program_id(1), scale, mask=valid[:, None])
    tl.store(inner_sums + at * inner_groups + tl.program_id(1), total, mask=valid[:, None])


@triton.jit
def down_prompt_kernel(
    pool,
    tiles,
    order,
    inner,
    inner_scales,
    inner_sums,
    out,
    slot_bytes,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    cols: tl.constexpr,
    width: tl.constexpr,
    PLANES: tl.constexpr,
    BIAS_AT: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``out`` fp32 [choices, cols] of what ``gate_up_prompt_kernel`` made. Grid (tiles, cols / BN)."""
    tile = tiles + 3 * tl.program_id(0)
    count = tl.load(tile + 2)
    if count == 0:
        return
    groups: tl.constexpr = (width + 63) // 64
    blob = pool + tl.load(tile).to(tl.int64) * slot_bytes
    i = tl.arange(0, BM)
    valid = i < count
    choice = tl.load(order + tl.load(tile + 1) + i, mask=valid, other=0).to(tl.int32)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    y = _product(
        blob, row, row < cols, inner, inner_scales, inner_sums, choice, valid, scale_at, zero_at, h_at, m_at, l_at,
        groups, PLANES, BN, BM, GB, STAGES,
    )  # fmt: skip
    if BIAS_AT >= 0:
        y += _bias(blob, row, row < cols, BIAS_AT, BIAS)
    tl.store(out + choice.to(tl.int64)[None, :] * cols + row[:, None], y, mask=valid[None, :] & (row < cols)[:, None])


@triton.jit
def combine_kernel(
    rows, index, weights, out, num_experts: tl.constexpr, cols: tl.constexpr, top_k: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t] = the sum of weights[t, k] * rows[t * top_k + k] over k in order (``reference.combine``). Grid (tokens, cols / BLOCK).

    ``rows`` fp32 [tokens * top_k, cols]; those without an expert in ``index`` [tokens, top_k] are taken for 0.
    """
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(top_k):
        weight = tl.load(weights + token * top_k + k).to(tl.float32)
        expert = tl.load(index + token * top_k + k)
        there = (n < cols) & (expert >= 0) & (expert < num_experts)
        value = tl.load(rows + (token * top_k + k) * cols + n, mask=there, other=0.0)
        total = tl.fma(weight + tl.zeros_like(total), value, total)
    tl.store(out + token * cols + n, total.to(out.dtype.element_ty), mask=n < cols)
