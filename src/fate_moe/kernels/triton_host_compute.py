"""Asking the host, from inside a graph, to compute experts that are not in VRAM, and taking its answers.

Question and answer lie in pinned memory that both sides see. Each word carries the number of its question in its upper half, so
that nothing depends on the order in which words become visible: a word counts when its number is right. The other side is
``csrc/host_compute.h``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ask_experts", "collect_kernel", "trial_kernel"]


@triton.jit
def ask_experts(
    questions, asked, hosted, masks, blob, x, tokens, cols: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Ask for the experts where ``hosted`` [E] is 1, whose blobs are ``blob`` int32 [E], on the activations ``x`` [tokens, cols]:
    each on those whose bits are set in its ``masks`` [E].

    ``asked`` int32 [1] counts questions; ``questions`` int64 [1 + 2 MOST + tokens cols] (csrc/host_compute.h).
    """
    place = tl.cumsum(hosted, axis=0) - 1
    count = tl.sum(hosted, axis=0)
    if count > 0:
        number = tl.load(asked) + 1
        tl.store(asked, number)
        tag = number.to(tl.int64) << 32
        tl.store(questions + 1 + place, tag | blob.to(tl.int64), mask=hosted > 0)
        tl.store(questions + 1 + MOST + place, tag | masks.to(tl.int64), mask=hosted > 0)
        for token in range(tokens):
            for start in tl.static_range(0, cols, BLOCK):
                c = start + tl.arange(0, BLOCK)
                bits = tl.load(x + token * cols + c, mask=c < cols, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
                to = questions + 1 + 2 * MOST + token * cols + c
                tl.store(to, tag | (bits.to(tl.int64) & 0xFFFFFFFF), mask=c < cols)
        tl.store(questions, tag | (tokens * 65536 + count).to(tl.int64))


@triton.jit
def collect_kernel(pending_rows, asked, answers, outside, cols: tl.constexpr, BLOCK: tl.constexpr):
    """outside[r] = the host's answer for choice row r if ``pending_rows[r]`` >= 2 (2 + its place). Grid (rows, cols / BLOCK).

    ``answers`` int64 [.., cols] in pinned memory, ``outside`` fp32 [rows, cols]. Waits for the host, looking at one word of its
    block only, so that the link is left to copies.
    """
    place = tl.load(pending_rows + tl.program_id(0)) - 2
    if place >= 0:
        number = tl.load(asked).to(tl.int64)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = c < cols
        row = answers + place * cols
        one = row + tl.program_id(1) * BLOCK
        while (tl.load(one, volatile=True) >> 32) != number:
            pass
        value = tl.zeros((BLOCK,), tl.int64)
        missing = 1
        while missing > 0:
            value = tl.load(row + c, mask=mask, other=0, volatile=True)
            missing = tl.sum((mask & ((value >> 32) != number)).to(tl.int32), axis=0)
        tl.store(outside + tl.program_id(0) * cols + c, value.to(tl.int32).to(tl.float32, bitcast=True), mask=mask)


@triton.jit
def trial_kernel(
    questions, asked, pending_rows, wanted, count, turn, misses, hosted, x, num_blobs, staging, num_staging, cols: tl.constexpr,
    MOST: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Serve ``misses`` int32 [1] experts, others each time: ask the host for ``hosted`` int32 [1], list the rest. One program.

    What is listed in ``wanted`` and ``count`` goes to the ``num_staging`` slots from ``staging`` on; ``turn`` int32 [1] counts
    calls.
    """
    i = tl.arange(0, E)
    now = tl.load(turn)
    tl.store(turn, now + 1)
    most, asks = tl.load(misses), tl.load(hosted)
    blob = (now * 97 + i * 13) % num_blobs
    copied = (i >= asks) & (i < most)
    tl.store(wanted + 2 * (i - asks), blob, mask=copied)
    tl.store(wanted + 2 * (i - asks) + 1, staging + (i - asks) % num_staging, mask=copied)
    tl.store(count, most - asks)
    one = (i < asks).to(tl.int32)
    ask_experts(questions, asked, one, one, blob, x, 1, cols, MOST, 1024)
    tl.store(pending_rows + i, tl.where(i < asks, 2 + i, 0))
