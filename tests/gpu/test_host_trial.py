"""Never slower than not trying: the host computes what it has sooner than the link, and nothing where it is slow."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.host_trial import hosted_of, make_trial, run_host_trial
from fate_moe.gpu.options import DeviceOptions
from fate_moe.kernels.native import native
from tests.support.device import CPU, Model, SwiGLU, random_model, twin

pytestmark = pytest.mark.slow


def times(copy: float, first: float, further: float, most: int = 4) -> list[list[float]]:
    """What m misses take with h on the host, if link and host do not disturb each other."""
    return [
        [max((m - h) * copy, first + (h - 1) * further if h else 0.0) for h in range(m + 1)]
        for m in range(1, most + 1)
    ]  # fmt: skip


def test_each_miss_goes_where_it_is_done_sooner() -> None:
    assert hosted_of(times(copy=56, first=55, further=31)) == [0, 0, 1, 2, 2]
    assert hosted_of(times(copy=200, first=55, further=31)) == [0, 1, 2, 3, 4], "a slow link"
    assert hosted_of(times(copy=56, first=300, further=200)) == [0, 0, 0, 0, 0], "a weak host"
    assert hosted_of([[1.0, 0.95]]) == [0, 0], "a gain that is within what such a measurement is worth"


def with_host(model: Model) -> DeviceExperts:
    host = HostCompute(model.layout, model.shapes, SwiGLU(), model.arena, model.top_k, CPU, threads=1)
    return model.experts(6, DeviceOptions(host_compute=None), host_compute=host)


@pytest.mark.skipif(native is None, reason="the C++ kernels are not built")
def test_the_trial_serves_as_many_as_it_says_from_both_sides() -> None:
    model = random_model(layers=1, experts=8, top_k=4)
    experts = with_host(model)
    state = experts.state
    host = state.host_compute
    assert host is not None
    misses, hosted, layers = make_trial(experts, host)
    misses.fill_(3)
    hosted.fill_(1)
    layers(2)
    assert int(host.asked) == 2
    for place, blob in enumerate(((97 + 13) % 8, (97 + 26) % 8)):  # of the second turn: the first is the host's
        slot = state.pool.slot(state.pool.num_slots + place)[: model.layout.length]
        assert slot.equal(model.arena.blob(blob))
    x, one = torch.ones(1, model.hidden), torch.ones(1, 1)
    assert torch.equal(host.outside[:1], twin(model, 0, x, torch.tensor([[97 % 8]]), one))
    run_host_trial(experts)
    assert state.shares.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4]
    state.stop_host_compute()
    assert state.host_compute is None
    assert not state.shares.any()
