"""How many of a layer's misses the host should compute (never slower than not trying): every division of them is timed at load.

For m misses of which h go to the host, one graph asks the host for h experts and copies m - h, as a layer of a captured step does;
both run at once, so that what they take from each other is in the time. It takes a fraction of a second, because one recorded graph
serves every m and h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.streams import Lane
from fate_moe.kernels.triton_host_compute import trial_kernel

__all__ = ["hosted_of", "run_host_trial"]

# What is timed has no step around it, and a processor that another program uses is slower: less of a gain than this is none.
MIN_GAIN = 1.1
_LAYERS, _TIMES = 4, 3  # in a recorded graph; replays of it


def hosted_of(seconds: Sequence[Sequence[float]]) -> list[int]:
    """For 0 misses and then each row of ``seconds``, how many the host computes: ``seconds[m - 1][h]`` is what m misses take with h
    of them on the host."""
    chosen = [0]
    for row in seconds:
        best = min(range(len(row)), key=row.__getitem__)
        chosen.append(best if row[best] * MIN_GAIN <= row[0] else 0)
    return chosen


def run_host_trial(experts: DeviceExperts) -> None:
    """Time every division of misses between link and host, and share them so; the host computes none where that never pays.

    Steps recorded before must be recorded anew. On a CPU, which only simulates a device, nothing is timed and each gets half.
    """
    state = experts.state
    host = state.host_compute
    if host is None or state.options.host_compute is not None:
        return
    if state.device.type == "cuda":
        state.share(hosted_of(_timed(experts, host)))
    else:
        state.share([(misses + 1) // 2 for misses in range(state.top_k + 1)])
    if not state.hosted_most:
        state.stop_host_compute()


def _timed(experts: DeviceExperts, host: HostCompute) -> list[list[float]]:
    """``hosted_of``'s argument, in milliseconds, of a whole graph."""
    misses, hosted, layers = make_trial(experts, host)
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layers(1)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(_LAYERS)
    rows = list[list[float]]()
    for most in range(1, experts.state.top_k + 1):
        misses.fill_(most)
        rows.append([])
        for share in range(most + 1):
            hosted.fill_(share)
            rows[-1].append(min(_milliseconds(graph.replay) for _ in range(_TIMES)))
    return rows


def make_trial(experts: DeviceExperts, host: HostCompute) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(misses int32 [1], how many of them the host computes int32 [1], a function that enqueues so many layers like that)."""
    state, device, rows = experts.state, experts.state.device, triton.next_power_of_2(host.most)
    misses, hosted = (torch.ones(1, dtype=torch.int32, device=device) for _ in range(2))
    turn, pending = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(rows, dtype=torch.int32, device=device)
    wanted = torch.zeros(rows + 1, 2, dtype=torch.int32, device=device)
    x = torch.ones(host.cols, dtype=torch.float32, device=device)
    main, link, answers = (Lane(device, side) for side in (False, True, True))
    num_blobs = len(state.layouts) * state.tables.num_experts

    def layers(count: int) -> None:
        for _ in range(count):
            trial_kernel[(1,)](
                host.questions, host.asked, pending, wanted, wanted[-1], turn, misses, hosted, x, num_blobs,
                state.pool.num_slots, state.pool.num_staging, cols=host.cols, MOST=host.most, E=rows, num_warps=4,
            )  # fmt: skip
            answers.follow(main)
            with answers:
                host.collect(pending)
            link.follow(main)
            with link:
                experts.fetch(wanted)
            main.follow(answers)
            main.follow(link)

    return misses, hosted, layers


def _milliseconds(run: Any) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
