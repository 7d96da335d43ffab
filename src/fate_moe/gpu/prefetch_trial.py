"""Whether copying experts ahead pays (never slower than not trying): the time of one copy against the time of one layer.

A wrong prefetch that is still under way delays the next layer's misses by the rest of its copy. With copies of c seconds, layers
of L seconds, a prefetch used with probability p and a next layer that misses something with probability q:

    gained = p * L        lost = (1 - p) * q * (c - L)

so that nothing is gained from c = (1 + p / ((1 - p) * q)) * L on, which is 2.4 L for p = 0.5 and q = 0.7, and sooner since a used
prefetch may arrive late too. Measured (docs/notebook/gpu.md): prefetching wins at 1.0 and 1.2 L and loses at 2.2 and 8 L.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fate_moe.gpu.experts import DeviceExperts

__all__ = ["measured", "prefetch_limit", "run_prefetch_trial"]

MAX_LAYERS = 2.0
_TIMES = 4


def prefetch_limit(limit: int, copy_seconds: float, layer_seconds: float) -> int:
    """``limit`` where an expert comes within MAX_LAYERS layers, else 0."""
    return limit if copy_seconds <= MAX_LAYERS * layer_seconds else 0


def measured(experts: DeviceExperts, one_token: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one expert's copy, and of one layer that misses none.

    ``one_token`` passes always the same token through the model, so that from the second time on no expert is missing; nothing may
    be copied ahead meanwhile (``experts.state.options.limit`` is 0), nor computed by the host (``share``).
    """
    state, device = experts.state, experts.state.device

    def seconds(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(_TIMES):
            _wait(device)
            began = time.perf_counter()
            work()
            _wait(device)
            taken.append(time.perf_counter() - began)
        return min(taken[1:])

    staging = state.pool.num_slots
    wanted = torch.tensor([[0, staging], [1, 0]], dtype=torch.int32, device=device)
    copy = seconds(lambda: experts.fetch(wanted))
    return copy, seconds(one_token) / len(state.layouts)


def run_prefetch_trial(experts: DeviceExperts, record: Callable[[], object], one_token: Callable[[], object]) -> None:
    """Time one copy and one step, turn prefetching off if it cannot pay, and ``record`` the decode step with what remains.

    Where nothing is copied ahead and the host computes misses, experts move in behind the step instead, as fast as the link carries
    them (``admit_every``): else those that the host computes would never be resident.

    ``one_token`` as ``measured``'s. On a CPU, which only simulates a device, nothing is timed and prefetching stays on.
    """
    state = experts.state
    limit = state.options.limit
    hosted = state.shares[: state.top_k + 1].tolist()
    if (limit or hosted[-1]) and state.device.type == "cuda":
        state.options = replace(state.options, limit=0, admit_every=0)
        state.share([0] * len(hosted))
        record()
        copy, layer = measured(experts, one_token)
        limit = prefetch_limit(limit, copy, layer)
        state.share(hosted)
        every = math.ceil(copy / layer) if hosted[-1] and not limit else 0
        state.options = replace(state.options, limit=limit, admit_every=every)
    record()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
