"""Prompts on the GPU: many tokens through quantized experts, on int8 tensor cores.

Twins: ``reference.linear_quantized`` and ``reference.expert_mlp``, to the bit. A *tile* is up to BM choice rows of one expert, so
experts of any popularity share one launch. For each group of 64 columns one integer product [BN weights, 64] x [64, BM tokens] is
made, whose sums are exact, and added to the chain of each output in registers: a row's bits depend on nothing but its own values.

Planes become bytes in registers: a byte of the 2-bit plane is four codes 16 places apart, spread over a word by two shifts; the
1-bit planes give two of their low bits with one shift each. Codes and activations therefore lie in the order of ``code_place``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_activations import activate
from fate_moe.kernels.triton_quantize import ASM, code_place, quantize_groups, to_float

__all__ = ["combine_kernel", "down_prompt_kernel", "gate_up_prompt_kernel"]


@triton.jit
def _spread(h, m0, m1, l0, l1, PLANES: tl.constexpr, BN: tl.constexpr):
    """int8 [BN, 64]: the codes of one group of BN rows, from the 16 bytes of their 2-bit plane, ``h`` [BN, 16] int32, and the two
    words each of their 1-bit planes [BN, 1]."""
    b = tl.arange(0, 16)[None, :]
    t = (h | (h << 12)) & 0x000F000F
    word = ((t | (t << 6)) & 0x03030303) << 2  # byte j is element 16 j + b
    if PLANES > 1:
        first = ((m0 >> b) & 0x00010001) << 1  # elements b and 16 + b at bits 1 and 17
        second = ((m1 >> b) & 0x00010001) << 1
        if PLANES > 2:
            first += (l0 >> b) & 0x00010001
            second += (l1 >> b) & 0x00010001
        word += tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [first, second], tl.int32, True, 1)
    wide = tl.reshape(tl.broadcast_to(word[:, :, None], (BN, 16, 4)), (BN, 64))
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [wide], tl.int8, True, 4)


@triton.jit
def _codes(blob, at, mask, h_at, m_at, l_at, PLANES: tl.constexpr, BN: tl.constexpr):
    """int8 [BN, 64]: codes of groups ``at`` [BN, 1] in the order of ``code_place``; less 128 if they are whole bytes."""
    if PLANES == 8:
        q = tl.load(blob + h_at + at * 64 + tl.arange(0, 64)[None, :], mask=mask, other=0)
        return (q ^ 128).to(tl.int8, bitcast=True)
    if ASM:
        h = tl.load(blob + h_at + at * 16 + tl.arange(0, 16)[None, :], mask=mask, other=0).to(tl.int32)
        m = (blob + m_at).to(tl.pointer_type(tl.int32)) + at * 2
        low = (blob + l_at).to(tl.pointer_type(tl.int32)) + at * 2
        m0 = tl.load(m, mask=mask, other=0) if PLANES > 1 else at
        m1 = tl.load(m + 1, mask=mask, other=0) if PLANES > 1 else at
        l0 = tl.load(low, mask=mask, other=0) if PLANES > 2 else at
        l1 = tl.load(low + 1, mask=mask, other=0) if PLANES > 2 else at
        return _spread(h, m0, m1, l0, l1, PLANES, BN)
    k = tl.arange(0, 64)[None, :]
    e = k % 4 * 16 + k // 4
    code = ((tl.load(blob + h_at + at * 16 + e % 16, mask=mask, other=0) >> (e // 16 * 2).to(tl.uint8)) & 3) << 2
    if PLANES > 1:
        code += ((tl.load(blob + m_at + at * 8 + e // 8, mask=mask, other=0) >> (e % 8).to(tl.uint8)) & 1) << 1
    if PLANES > 2:
        code += (tl.load(blob + l_at + at * 8 + e // 8, mask=mask, other=0) >> (e % 8).to(tl.uint8)) & 1
    return code.to(tl.int8)


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
    num_rows,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    groups: tl.constexpr,
    PLANES: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """[BN, BM] fp32: rows ``row`` [BN] of a matrix in ``blob`` times activations ``token`` [BM] of ``num_rows``."""
    # A byte's code is counted from 128; a code cut short stands for the middle of its bin.
    middle: tl.constexpr = 0.5 if PLANES == 2 else (1.5 if PLANES == 1 else 0.0)
    k = tl.arange(0, 64)
    y = tl.zeros((BN, BM), tl.float32)
    x_at = codes + token.to(tl.int64)[None, :] * (groups * 64) + k[:, None]
    for g in range(groups):
        at = row * groups + g
        x = tl.load(x_at + g * 64, mask=token_mask[None, :], other=0)
        a = tl.load(scales + g * num_rows + token, mask=token_mask, other=0.0)
        x_sum = tl.load(sums + g * num_rows + token, mask=token_mask, other=0.0)
        w = _codes(blob, at[:, None], row_mask[:, None], h_at, m_at, l_at, PLANES, BN)
        scale = tl.load((blob + scale_at).to(tl.pointer_type(tl.float16)) + at, mask=row_mask, other=0.0).to(tl.float32)
        zero = tl.load((blob + zero_at).to(tl.pointer_type(tl.float16)) + at, mask=row_mask, other=0.0).to(tl.float32)
        D = tl.dot(w, x, out_dtype=tl.int32)
        if PLANES == 8:
            D += (x_sum * 128.0).to(tl.int32)[None, :]
        term = tl.fma(tl.broadcast_to(scale[:, None], (BN, BM)), to_float(D), (scale * middle - zero)[:, None] * x_sum[None, :])
        y = tl.fma(tl.broadcast_to(a[None, :], (BN, BM)), term, y)
    return y


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
    num_rows,
    num_choices,
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
    BM: tl.constexpr,
):
    """act(gate(x)) * up(x), quantized. Grid (tiles, width / 64).

    ``tiles`` int32 [.., 3]: slot, first place in ``order``, number of rows (at most BM; 0: no tile). ``order`` int64 [choices]
    sorts choices (token * top_k + choice) by expert. ``codes``, ``scales``, ``sums`` of ``num_rows`` tokens are as
    ``quantize_rows_kernel`` makes them, and so are ``inner``, ``inner_scales``, ``inner_sums`` of ``num_choices`` choices.
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
    row = tl.where(r % 2 == 0, place, place + width)  # a gate row, then its up row
    y = _product(
        blob, row, place < width, codes, scales, sums, choice // top_k, valid, num_rows, scale_at, zero_at, h_at, m_at, l_at,
        groups, PLANES, 128, BM,
    )  # fmt: skip
    gate, up = tl.split(tl.permute(tl.reshape(y, (64, 2, BM)), (2, 0, 1)))  # [BM, 64]
    n = tl.program_id(1) * 64 + tl.arange(0, 64)
    value = tl.where((n < width)[None, :], activate(gate, up, ACT), 0.0)
    made, scale, total = quantize_groups(value)
    at = choice[:, None]
    to = inner + at.to(tl.int64) * (inner_groups * 64) + tl.program_id(1) * 64 + code_place(PLANES)[None, :]
    tl.store(to, made.to(tl.int8), mask=valid[:, None])
    tl.store(inner_scales + tl.program_id(1) * num_choices + at, scale, mask=valid[:, None])
    tl.store(inner_sums + tl.program_id(1) * num_choices + at, total, mask=valid[:, None])


@triton.jit
def down_prompt_kernel(
    pool,
    tiles,
    order,
    inner,
    inner_scales,
    inner_sums,
    out,
    num_choices,
    slot_bytes,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    cols: tl.constexpr,
    width: tl.constexpr,
    PLANES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
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
        blob, row, row < cols, inner, inner_scales, inner_sums, choice, valid, num_choices, scale_at, zero_at, h_at, m_at, l_at,
        groups, PLANES, BN, BM,
    )  # fmt: skip
    tl.store(out + choice.to(tl.int64)[None, :] * cols + row[:, None], y, mask=valid[None, :] & (row < cols)[:, None])


@triton.jit
def combine_kernel(rows, weights, out, cols: tl.constexpr, top_k: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the sum of weights[t, k] * rows[t * top_k + k] over k in order (``reference.combine``). Grid (tokens, cols / BLOCK).

    ``rows`` fp32 [tokens * top_k, cols].
    """
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(top_k):
        weight = tl.load(weights + token * top_k + k).to(tl.float32)
        value = tl.load(rows + (token * top_k + k) * cols + n, mask=n < cols, other=0.0)
        total = tl.fma(weight + tl.zeros_like(total), value, total)
    tl.store(out + token * cols + n, total.to(out.dtype.element_ty), mask=n < cols)
