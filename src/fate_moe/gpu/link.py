"""How fast experts travel from RAM to this GPU and how fast the CPU reads them, each alone and both at once.

Measured once a machine by ``fate doctor --measure``; the result is a file under FATE_HOME.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fate_moe.errors import ConfigError
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.io.bounded import load_json
from fate_moe.io.files import atomic_file
from fate_moe.switches import cache_home
from fate_moe.units import parse_host_compute

__all__ = ["Link", "chosen_fraction", "load_link", "measure_link", "save_link"]

_NAME = "link.json"
# Computing misses on the CPU pays for its synchronization only where misses are served this much faster.
_MIN_GAIN = 1.25
# Of the rate at which the CPU reads, that at which it computes INT4 experts: 64 of 98 GB/s (one H200's host, 14 threads).
_COMPUTES = 0.65


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

    @property
    def computing(self) -> float:
        """Bytes of experts per second that the CPU computes while the link copies."""
        return _COMPUTES * self.both_memory

    @property
    def gain(self) -> float:
        """How much faster misses could be served by both at once than by the link alone."""
        return (self.both_zero_copy + self.computing) / self.zero_copy

    @property
    def cpu_fraction(self) -> float:
        """The fraction of misses that the CPU should compute: as many as it can in the time the link copies the rest; 0.0 where
        that gains little."""
        return self.computing / (self.both_zero_copy + self.computing) if self.gain >= _MIN_GAIN else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain, "cpu_fraction": self.cpu_fraction}


def save_link(link: Link) -> str:
    """Write ``link`` for later runs; returns the file's path. Raises ConfigError if it cannot be written."""
    path = cache_home() / _NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, shared=True) as file:
            file.write(json.dumps(asdict(link), indent=1).encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); set FATE_HOME to a folder of yours") from error
    return str(path)


def load_link(gpu: str) -> Link | None:
    """What was measured with this ``gpu``; None if nothing was, or it cannot be read."""
    try:
        link = Link(**load_json(cache_home() / _NAME))
    except (OSError, ValueError, TypeError):
        return None
    return link if link.gpu == gpu else None


def chosen_fraction(host_compute: str | int | float, gpu: str) -> float:
    """The fraction that OffloadConfig.host_compute means on ``gpu``. Raises ConfigError for "auto" where nothing was measured."""
    fraction = parse_host_compute(host_compute)
    if fraction is not None:
        return fraction
    if (link := load_link(gpu)) is None:
        raise ConfigError(
            f"--host-compute auto needs to know this machine's link to the {gpu}; run `fate doctor --measure` once, or give a "
            "fraction such as 0.5"
        )
    return link.cpu_fraction


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
