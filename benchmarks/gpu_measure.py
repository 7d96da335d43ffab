"""Measures copies, kernels, launches and host compute on this device; used by ``benchmarks/gpu.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu_model import RandomModel
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.kernels.triton_fetch import fetch_kernel
from fate_moe.kernels.triton_host_compute import ask_experts
from fate_moe.layers.cuda_step import FusedStep

__all__ = [
    "captured", "copies", "copy_microseconds", "event", "host_answers", "launches", "milliseconds", "overlap",
    "prompt_parts",
]  # fmt: skip


_PROMPT_KERNELS = {
    "grouped_kernel": "experts", "prompt_kernel": "experts", "combine_kernel": "experts", "quantize_rows": "experts",
    "nvjet": "dense", "gemm": "dense", "cutlass": "dense", "sdpa": "attention", "fmha": "attention", "flash": "attention",
}  # fmt: skip


def milliseconds(run: Callable[[], Any], repeat: int = 20) -> float:
    """Median time of ``run`` on the device."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeat):
        start, end = event(), event()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def captured(run: Callable[[], Any], times: int = 1) -> Callable[[], None]:
    """``run``, ``times`` in a row in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    return graph.replay


def copies(results: dict[str, Any]) -> None:
    """Device copy bandwidth, DMA and zero-copy reads of pinned memory, in GB/s."""
    device = torch.device("cuda")
    halves = torch.empty(2, 1 << 30, dtype=torch.uint8, device=device)
    results["device_copy"] = 2 * halves[0].numel() / milliseconds(lambda: halves[0].copy_(halves[1])) / 1e6
    blob = 4 << 20
    arena, pool = PinnedArena(64, blob, device), VramPool(64, 0, blob, device)
    arena.bytes.random_(0, 255)
    for size in (1 << 20, 4 << 20, 64 << 20):
        took = milliseconds(partial(pool.bytes[:size].copy_, arena.bytes[:size], non_blocking=True))
        results[f"dma_{size >> 20}MiB"] = size / took / 1e6
    for count in (1, 4, 32):
        wanted = torch.tensor([[i, i] for i in range(count)], dtype=torch.int32, device=device)
        number = torch.tensor([count], dtype=torch.int32, device=device)
        for programs in (4, 8, 16, 32, 64):

            def fetch(programs: int = programs, wanted: Any = wanted, number: Any = number) -> None:
                fetch_kernel[(programs,)](arena.bytes, pool.bytes, wanted, number, blob, blob, BLOCK=4096, num_warps=8)

            took = milliseconds(captured(fetch, 4)) / 4
            results[f"fetch_{count}x4MiB_by_{programs}"] = count * blob / took / 1e6
    assert torch.equal(pool.bytes[: 32 * blob].cpu(), arena.bytes[: 32 * blob]), "fetched bytes differ"
    arena.close()


def copy_microseconds(random: RandomModel, experts: DeviceExperts) -> dict[str, float]:
    """What one expert takes to come to its slot, by the number of the copying kernel's programs."""
    staging, found = experts.state.pool.num_slots, {}
    wanted = torch.tensor([[0, staging], [1, 0]], dtype=torch.int32, device="cuda")
    whole = experts.state.options
    for programs in (8, 16, 27, 32, 54):
        experts.state.options = replace(whole, fetch_programs=programs)
        found[str(programs)] = milliseconds(captured(lambda: experts.fetch(wanted), 8)) / 8 * 1e3
    experts.state.options = whole
    return found


def launches(fused: FusedStep) -> int:
    """Kernels of one replayed step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fused.replay()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_time_total > 0)


def overlap(fused: FusedStep, steps: int = 2) -> dict[str, float]:
    """Of ``steps`` replayed steps: the fraction of time in which experts are copied, and the fraction of that with another kernel
    running; by the profiler, under which a step is slower than without."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            fused.replay()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, "fetch" in event.name)
        for event in profile.events() or []
        if event.device_type.name == "CUDA"
    ]
    copying, computing = ([(start, end) for start, end, fetch in spans if fetch is kind] for kind in (True, False))
    total = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    copied = _length(copying)
    both = copied + _length(computing) - _length([*copying, *computing])
    return {"copy_share": copied / total, "copy_overlapped": both / copied if copied else 1.0}


def prompt_parts(read: Callable[[], Any]) -> dict[str, float]:
    """For the pass of one prompt: launches, and the device's milliseconds in experts, dense products, attention and the rest."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        read()
        torch.cuda.synchronize()
    totals = {"launches": 0.0, "experts_ms": 0.0, "dense_ms": 0.0, "attention_ms": 0.0, "other_ms": 0.0}
    for event in profile.events() or []:
        if event.device_type.name == "CUDA":
            kinds = [kind for name, kind in _PROMPT_KERNELS.items() if name in event.name.lower()]
            totals["launches"] += 1
            totals[f"{kinds[0] if kinds else 'other'}_ms"] += (event.time_range.end - event.time_range.start) / 1e3
    return totals


def _length(spans: list[tuple[float, float]]) -> float:
    """The length of the union of ``spans``."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _question_kernel(questions, asked, pending, x, count, num_blobs, cols: tl.constexpr, MOST: tl.constexpr, E: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Ask for ``count`` blobs, others each time."""
    i = tl.arange(0, E)
    blob = (tl.load(asked) * 97 + i * 13) % num_blobs
    place = ask_experts(questions, asked, (i < count).to(tl.int32), blob, x, cols, MOST, 1024)
    tl.store(pending + i, tl.where(i < count, 2 + place, 0))


def host_answers(random: RandomModel, host: HostCompute, results: dict[str, Any]) -> None:
    """Microseconds from a question for n experts to the answer in VRAM, the host reading other experts each time."""
    x = torch.randn(host.cols, device="cuda").bfloat16()
    rows = triton.next_power_of_2(host.most)
    pending = torch.zeros(rows, dtype=torch.int32, device="cuda")
    results["host_us"] = {}
    for count in range(1, host.most + 1):

        def ask(count: int = count) -> None:
            _question_kernel[(1,)](
                host.questions, host.asked, pending, x, count, random.arena.num_blobs, cols=host.cols, MOST=host.most, E=rows
            )
            host.collect(pending)

        results["host_us"][str(count)] = milliseconds(captured(ask, 32)) / 32 * 1e3
