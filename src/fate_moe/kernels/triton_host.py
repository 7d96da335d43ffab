"""Asking the host, from inside a graph, where experts are in its memory: it may have to read them from disk first.

The mailbox lies in pinned memory, where device and host see each word whole. Each word carries the number of the question in its
upper half, so that nothing depends on the order in which words become visible: a word counts when its number is right.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ask_kernel"]


@triton.jit
def ask_kernel(wanted, count, asked, questions, answers, R: tl.constexpr):
    """Replace the expert in each of the first ``count[0]`` pairs of ``wanted`` int32 [.., 2] by its place in host memory.

    One program; waits for the host. ``asked`` int32 [1] counts questions. ``questions`` int64 [1 + R]: number and count, then
    number and expert; ``answers`` int64 [R]: number and place. Nothing to ask is no question.
    """
    num = tl.load(count)
    if num > 0:
        number = tl.load(asked) + 1
        tl.store(asked, number)
        i = tl.arange(0, R)
        mask = i < num
        tag = number.to(tl.int64) << 32
        tl.store(questions + 1 + i, tag | tl.load(wanted + 2 * i, mask=mask, other=0).to(tl.int64), mask=mask)
        tl.store(questions, tag | num.to(tl.int64))
        place = tl.zeros((R,), tl.int64)
        missing = num
        while missing > 0:
            answer = tl.load(answers + i, mask=mask, other=0, volatile=True)
            missing = tl.sum((mask & ((answer >> 32) != number.to(tl.int64))).to(tl.int32), axis=0)
            place = answer & 0xFFFFFFFF
        tl.store(wanted + 2 * i, place.to(tl.int32), mask=mask)
