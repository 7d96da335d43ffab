"""Prefill on the GPU: grouped products over tokens sorted by expert, dequantizing each weight tile on its way to the tensor cores.

Twin: ``kernels/reference.py: expert_mlp``. A *tile* is up to BM rows of one expert, so experts of any popularity share one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_experts import _activate

__all__ = ["grouped_kernel", "tiles_kernel"]


@triton.jit
def _accumulate(
    total,
    blob,
    x,
    x_mask,
    row,
    row_mask,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    cols: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    PLANES: tl.constexpr,
    GB: tl.constexpr,
):
    """total + x W^T for rows ``row`` [BN] of a matrix of ``cols`` columns in ``blob``; ``x`` [BM, 1] points to the tokens' rows."""
    groups: tl.constexpr = (cols + 63) // 64
    kk = tl.arange(0, GB * 16)
    for start in range(0, groups, GB):
        g = start + kk // 16
        b = kk % 16
        mask = row_mask[None, :] & (g < groups)[:, None]
        at = row[None, :] * groups + g[:, None]  # [GB * 16, BN]
        if PLANES > 0:
            scale = tl.load((blob + scale_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
            zero = tl.load((blob + zero_at).to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0).to(tl.float32)
            if PLANES < 8:
                h = tl.load(blob + h_at + at * 16 + b[:, None], mask=mask, other=0).to(tl.int32)
            middle: tl.constexpr = 0.0 if PLANES >= 3 else (0.5 if PLANES == 2 else 1.5)
        for j in tl.static_range(4):
            element = g * 64 + 16 * j + b
            xs = tl.load(x + element[None, :], mask=x_mask & (element < cols)[None, :], other=0.0)
            if PLANES == 0:
                weights = (blob + scale_at).to(tl.pointer_type(DTYPE)) + row[None, :] * cols + element[:, None]
                w = tl.load(weights, mask=mask & (element < cols)[:, None], other=0.0)
            elif PLANES == 8:
                w = tl.load(blob + h_at + at * 64 + 16 * j + b[:, None], mask=mask, other=0).to(tl.float32) * scale - zero
            else:
                code = ((h >> (2 * j)) & 3) * 4
                if PLANES > 1:
                    m = tl.load((blob + m_at).to(tl.pointer_type(tl.uint16)) + at * 4 + j, mask=mask, other=0).to(tl.int32)
                    code += ((m >> b[:, None]) & 1) * 2
                if PLANES > 2:
                    low = tl.load((blob + l_at).to(tl.pointer_type(tl.uint16)) + at * 4 + j, mask=mask, other=0).to(tl.int32)
                    code += (low >> b[:, None]) & 1
                w = (code.to(tl.float32) + middle) * scale - zero
            total = tl.dot(xs.to(DOT), w.to(DOT), total, input_precision="ieee")
    return total


@triton.jit
def grouped_kernel(
    pool,
    tiles,
    order,
    source,
    out,
    slot_bytes,
    scale_at,
    zero_at,
    h_at,
    m_at,
    l_at,
    top_k: tl.constexpr,
    cols: tl.constexpr,
    rows: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    PLANES: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GB: tl.constexpr,
):
    """Grid (tiles, rows / BN). ``tiles`` int32 [.., 3]: slot, first place in ``order``, number of rows (at most BM; 0: no tile).

    ``order`` int64 [choice rows] sorts choice rows (token * top_k + choice) by expert. With ACT "silu" or "gelu" the matrix is
    gate_up [2 * rows, cols], ``source`` [tokens, cols] the hidden states and ``out`` [choice rows, rows]; with ACT "" it is down
    [rows, cols], ``source`` [choice rows, cols] and ``out`` as before. Both are addressed by choice row. Products are
    made in DOT: the hidden states' own dtype (fp32 under the interpreter, which has no bf16 product).
    """
    tile = tiles + 3 * tl.program_id(0)
    count = tl.load(tile + 2)
    if count == 0:
        return
    blob = pool + tl.load(tile).to(tl.int64) * slot_bytes
    i = tl.arange(0, BM)
    valid = i < count
    r = tl.load(order + tl.load(tile + 1) + i, mask=valid, other=0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    x = source + (r // top_k if ACT != "" else r)[:, None] * cols
    total = tl.zeros((BM, BN), tl.float32)
    total = _accumulate(
        total, blob, x, valid[:, None], n, n < rows, scale_at, zero_at, h_at, m_at, l_at, cols, DTYPE, DOT, PLANES, GB
    )
    if ACT != "":
        up = tl.zeros((BM, BN), tl.float32)
        up = _accumulate(
            up, blob, x, valid[:, None], n + rows, n < rows, scale_at, zero_at, h_at, m_at, l_at, cols, DTYPE, DOT, PLANES, GB
        )
        total = _activate(total, up, ACT)
    tl.store(out + r[:, None] * rows + n[None, :], total.to(out.dtype.element_ty), mask=valid[:, None] & (n < rows)[None, :])


@triton.jit
def tiles_kernel(first, slot_of, tiles, num_experts: tl.constexpr, BM: tl.constexpr, E: tl.constexpr):
    """One program: ``tiles`` of the experts that have a slot, for ``grouped_kernel``; the table is zero before.

    ``first`` int64 [num_experts + 1]: each expert's first place in the order, and where the last one's rows end. ``slot_of`` int32
    [num_experts], negative for none. An expert's tiles are those that a host would cut, which keeps the guarantee of same numbers.
    """
    e = tl.arange(0, E)
    start = tl.load(first + e, mask=e < num_experts, other=0).to(tl.int32)
    count = tl.load(first + e + 1, mask=e < num_experts, other=0).to(tl.int32) - start
    slot = tl.load(slot_of + e, mask=e < num_experts, other=-1)
    count = tl.where(slot >= 0, count, 0)
    number = (count + BM - 1) // BM
    place = tiles + 3 * (tl.cumsum(number, 0) - number)
    for k in range(tl.max(number, 0)):
        mask = k < number
        tl.store(place + 3 * k, slot, mask=mask)
        tl.store(place + 3 * k + 1, start + k * BM, mask=mask)
        tl.store(place + 3 * k + 2, tl.minimum(count - k * BM, BM), mask=mask)
