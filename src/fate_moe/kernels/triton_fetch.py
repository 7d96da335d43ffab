"""Experts from pinned host memory to VRAM slots, by a kernel that reads the host's memory itself (zero-copy).

A list made on the device says which expert goes to which slot, so no host is asked; inside a CUDA graph there is none to ask. Eight
programs are enough to fill PCIe 5 (47.8 GB/s at 4 MiB on an H200; the DMA engine's 52.5 need the host).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fetch_kernel"]


@triton.jit
def fetch_kernel(host, pool, wanted, count, num_bytes, slot_bytes, BLOCK: tl.constexpr):
    """Copy ``num_bytes`` (a multiple of 16) of each listed expert's blob. Grid: any number of programs, which share the work
    evenly.

    ``host`` and ``pool`` are bytes, blobs and slots every ``slot_bytes``; ``wanted`` int32 [.., 2] pairs (blob, slot), of which the
    first ``count[0]`` count. BLOCK is in 4-byte words.
    """
    total = tl.load(count)
    chunks = tl.cdiv(num_bytes // 4, BLOCK)
    word = tl.arange(0, BLOCK)
    for i in range(tl.program_id(0), total * chunks, tl.num_programs(0)):
        item = i // chunks
        at = (i % chunks) * BLOCK + word
        source = host + tl.load(wanted + 2 * item).to(tl.int64) * slot_bytes
        target = pool + tl.load(wanted + 2 * item + 1).to(tl.int64) * slot_bytes
        mask = at < num_bytes // 4
        value = tl.load(source.to(tl.pointer_type(tl.int32)) + at, mask=mask)
        tl.store(target.to(tl.pointer_type(tl.int32)) + at, value, mask=mask)
