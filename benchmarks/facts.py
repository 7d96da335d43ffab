"""Facts and bandwidths of the machine, measured in the same run as everything else; the floors are computed from them."""

from __future__ import annotations

import mmap
import os
import platform
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

__all__ = ["disk_bandwidth", "machine_facts", "memory_bandwidth", "processor_facts", "processor_folder"]

_READ_BYTES = 4 << 20  # the size of a typical expert


def memory_bandwidth(threads: int, array_bytes: int = 1 << 30) -> float:
    """Bytes per second of a reading sweep (dot product of fp32) with ``threads`` threads; median of five."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(array_bytes // 8)
        b = torch.ones(array_bytes // 8)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            torch.dot(a, b)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return array_bytes / median(seconds[1:])


def disk_bandwidth(file: Path, threads: int = 2, total_bytes: int = 1 << 30) -> float:
    """Bytes per second of O_DIRECT reads of 4 MiB spread over ``file``, with ``threads`` threads; median of three sweeps."""
    count = min(file.stat().st_size, total_bytes) // _READ_BYTES
    stride = file.stat().st_size // max(1, count) // _READ_BYTES * _READ_BYTES

    def sweep(first: int) -> None:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        try:
            with mmap.mmap(-1, _READ_BYTES) as buffer:
                for index in range(first, count, threads):
                    os.preadv(descriptor, [buffer], index * stride)
        finally:
            os.close(descriptor)

    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(sweep, range(threads)))
            seconds.append(time.perf_counter() - start)
    return count * _READ_BYTES / median(seconds)


def processor_facts() -> dict[str, Any]:
    """The processor's name and which of the instructions that kernels use it has."""
    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in cpu.items()}
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "asimddp", "i8mm")
    return {"processor": cpu.get("model name", platform.processor()), "instructions": [flag for flag in known if flag in flags]}


def processor_folder(facts: dict[str, Any]) -> str:
    """A folder's name for the results of a processor, of ``processor_facts``; AMX is named, which the same name may have or not."""
    words = re.sub(r"\((r|tm)\)", " ", facts["processor"].lower())
    amx = "-amx" if "amx_int8" in facts["instructions"] else ""
    return (re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "processor") + amx


def machine_facts(file: Path, threads: int) -> dict[str, Any]:
    """Processor, memory and bandwidths; the disk is measured by reading ``file``, which should be large."""
    return {
        **processor_facts(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_bytes_per_second": memory_bandwidth(threads),
        "disk_bytes_per_second": disk_bandwidth(file),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
