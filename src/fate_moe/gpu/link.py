"""How fast experts travel from RAM to this GPU and how fast the CPU reads them (``fate doctor --measure``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fate_moe.gpu.memory import PinnedArena, VramPool

__all__ = ["Link", "measure_link"]


@dataclass(frozen=True)
class Link:
    """Bytes per second. ``dma``: the copy engine from pinned memory; ``zero_copy``: a kernel that reads it, as a captured step
    does; ``memory``: reads by all of torch's threads; ``both_*``: the latter two at once."""

    gpu: str
    threads: int
    dma: float
    zero_copy: float
    memory: float
    both_zero_copy: float
    both_memory: float


def measure_link(
    gpu: str,
    device: torch.device,
    *,
    blob_bytes: int = 4 << 20,
    num_blobs: int = 64,
    memory_bytes: int = 1 << 30,
    seconds: float = 0.5,
) -> Link:
    """Measure for about four times ``seconds``; takes ``num_blobs * blob_bytes`` of pinned memory and of VRAM, and ``memory_bytes``
    of RAM."""
    from fate_moe.kernels.triton_fetch import fetch_kernel

    arena, pool = PinnedArena(num_blobs, blob_bytes, device), VramPool(num_blobs, 0, blob_bytes, device)
    arena.bytes.fill_(1)
    listed = [[i, i] for i in range(num_blobs)]
    wanted = torch.tensor([*listed, [num_blobs, 0]], dtype=torch.int32, device=device)
    memory = PinnedArena(1, memory_bytes, device)  # as experts lie: torch's own small pages were read at 45 GB/s on 16 threads
    data = memory.bytes.view(torch.float32)
    data.fill_(1)
    arguments = (arena.bytes, pool.bytes, wanted, wanted[-1], blob_bytes, blob_bytes)

    def dma() -> None:
        for i in range(num_blobs):
            pool.slot(i).copy_(arena.blob(i), non_blocking=True)

    def zero_copy() -> None:
        fetch_kernel[(16,)](*arguments, BLOCK=4096, num_warps=8)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def read() -> None:
        data.sum()

    all_blobs = num_blobs * blob_bytes
    by_engine, by_kernel = (_rate(work, wait, all_blobs, seconds) for work in (dma, zero_copy))
    reading = _rate(read, wait, memory_bytes, seconds)
    both = _both(zero_copy, wait, all_blobs, read, memory_bytes, seconds, expected=by_kernel)
    arena.close()
    memory.close()
    return Link(gpu, torch.get_num_threads(), by_engine, by_kernel, reading, *both)


def _rate(work: Callable[[], None], wait: Callable[[], None], num_bytes: int, seconds: float) -> float:
    """Bytes per second of ``work`` over about ``seconds``, after one run that does not count."""
    work()
    wait()
    began, times = time.perf_counter(), 0
    while not times or time.perf_counter() - began < seconds:
        work()
        wait()
        times += 1
    return times * num_bytes / (time.perf_counter() - began)


def _both(
    copy: Callable[[], None],
    wait: Callable[[], None],
    copy_bytes: int,
    read: Callable[[], None],
    read_bytes: int,
    seconds: float,
    expected: float,
) -> tuple[float, float]:
    """(copied, read) bytes per second at once: copies for about ``seconds`` are enqueued, and memory is read until they have ended.

    The last read may end after the copies; no further one follows.
    """
    times = max(1, round(seconds * expected / copy_bytes))
    began, reads = time.perf_counter(), 0
    for _ in range(times):
        copy()
    end = began + times * copy_bytes / expected
    while not reads or time.perf_counter() < end:
        read()
        reads += 1
    reading = time.perf_counter() - began
    wait()
    return times * copy_bytes / (time.perf_counter() - began), reads * read_bytes / reading
