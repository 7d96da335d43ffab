"""Decode on the GPU: the chosen experts' MLP for a few tokens, straight from their slots in the VRAM pool, in two launches.

Twins: ``reference.linear_quantized`` and ``reference.expert_mlp``; quantized experts give the twin's bits. Weights are never
written out dequantized: a group's integer sum is made of its planes one by one, D = 4 (h . x) + (2 m + l) . x, four products at a
time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_activations import activate
from fate_moe.kernels.triton_products import chain, products
from fate_moe.kernels.triton_quantize import quantize_groups, store_group

__all__ = ["down_kernel", "gate_up_kernel"]


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
    has a whole group of inner values; with MIXED gate and up rows take turns, and with BIAS_AT not negative there are biases of
    dtype BIAS in the blob. GB: lanes of a row, of unquantized experts groups at once; ROWS: rows at once. With EARLY the next
    kernel may begin at once; it must wait before it reads ``inner``.
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
                y = products(
                    blob + tl.zeros_like(place), place, 1 if MIXED else width, width, place >= 0, x + tl.zeros((1, 1), tl.int32), x,
                    scale_at, zero_at, h_at, m_at, l_at, groups, PLANES, 64 // ROWS, 128 // ROWS, ROWS, GB,
                    4 if PLANES == 8 else 2, 4, False, 2 if MIXED else 1,
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
        y = products(
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
    total = chain(tl.zeros((BN,), tl.float32), y, routing_weights + token * top_k, top_k)
    if RESIDUAL:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + token * cols + n, mask=n < cols, other=0.0).to(tl.float32)
    tl.store(out + token * cols + n, total.to(out.dtype.element_ty), mask=n < cols)
