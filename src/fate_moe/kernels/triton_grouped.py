"""Prompts on the GPU: which rows of which experts make up a launch, and unquantized experts' products.

Twin: ``kernels/reference.py: expert_mlp``. A *tile* is up to BM rows of one expert, so experts of any popularity share one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fate_moe.kernels.triton_activations import activate

__all__ = ["grouped_kernel", "order_kernel", "tiles_kernel"]


@triton.jit
def _accumulate(
    total,
    weights,
    x,
    x_mask,
    row,
    row_mask,
    cols: tl.constexpr,
    DOT: tl.constexpr,
    BK: tl.constexpr,
):
    """total + x W^T for rows ``row`` [BN] of ``weights`` [.., cols]; ``x`` [BM, 1] points to the tokens' rows."""
    k = tl.arange(0, BK)
    for start in range(0, cols, BK):
        element = start + k
        xs = tl.load(x + element[None, :], mask=x_mask & (element < cols)[None, :], other=0.0)
        w = tl.load(weights + row[None, :] * cols + element[:, None], mask=row_mask[None, :] & (element < cols)[:, None], other=0.0)
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
    weights_at,
    top_k: tl.constexpr,
    cols: tl.constexpr,
    rows: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Unquantized experts. Grid (tiles, rows / BN). ``tiles`` and ``order`` are as in ``triton_prompt.gate_up_prompt_kernel``.

    With ACT "silu" or "gelu" the matrix is gate_up [2 * rows, cols], ``source`` [tokens, cols] the hidden states and ``out``
    [choices, rows]; with ACT "" it is down [rows, cols], ``source`` [choices, cols] and ``out`` as before. Products are made in
    DOT: the hidden states' own dtype (fp32 under the interpreter, which has no bf16 product).
    """
    tile = tiles + 3 * tl.program_id(0)
    count = tl.load(tile + 2)
    if count == 0:
        return
    weights = (pool + tl.load(tile).to(tl.int64) * slot_bytes + weights_at).to(tl.pointer_type(DTYPE))
    i = tl.arange(0, BM)
    valid = i < count
    r = tl.load(order + tl.load(tile + 1) + i, mask=valid, other=0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    x = source + (r // top_k if ACT != "" else r)[:, None] * cols
    total = _accumulate(tl.zeros((BM, BN), tl.float32), weights, x, valid[:, None], n, n < rows, cols, DOT, BK)
    if ACT != "":
        up = _accumulate(tl.zeros((BM, BN), tl.float32), weights, x, valid[:, None], n + rows, n < rows, cols, DOT, BK)
        total = activate(total, up, ACT)
    tl.store(out + r[:, None] * rows + n[None, :], total.to(out.dtype.element_ty), mask=valid[:, None] & (n < rows)[None, :])


@triton.jit
def order_kernel(index, order, first, count, num_experts: tl.constexpr, BLOCK: tl.constexpr):
    """``order`` int64 [count]: the choices by expert, each expert's in their order. Grid (num_experts + 1,).

    ``index`` int64 [count] has each choice's expert; choices of no expert come last. ``first`` int64 [num_experts + 1]: each
    expert's first place in the order, and where the last one's end.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = 0
    for start in range(0, count, BLOCK):
        chosen = _chosen(index, start + lane, count, num_experts)
        before += tl.sum((chosen < expert).to(tl.int32), 0)
    tl.store(first + expert, before)
    for start in range(0, count, BLOCK):
        mine = (_chosen(index, start + lane, count, num_experts) == expert).to(tl.int32)
        tl.store(order + before + tl.cumsum(mine, 0) - 1, (start + lane).to(tl.int64), mask=mine > 0)
        before += tl.sum(mine, 0)


@triton.jit
def _chosen(index, choice, count, num_experts: tl.constexpr):
    """The experts of choices; num_experts of those without one, and above that beyond the last choice."""
    chosen = tl.load(index + choice, mask=choice < count, other=num_experts + 1).to(tl.int32)
    return tl.where((chosen < 0) | ((chosen > num_experts) & (choice < count)), num_experts, chosen)


@triton.jit
def tiles_kernel(first, slot_of, tiles, num_experts: tl.constexpr, BM: tl.constexpr, E: tl.constexpr):
    """One program: ``tiles`` of the experts that have a slot, for a prompt's kernels; the table is zero before.

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
