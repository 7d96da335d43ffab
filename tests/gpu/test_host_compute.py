"""Misses computed on the host: a real mailbox and the real C++ threads, the device's side under Triton's interpreter."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fate_moe.errors import UnsupportedModelError
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.state import DeviceState
from fate_moe.kernels.native import native
from fate_moe.kernels.plain_layer import Router
from fate_moe.kernels.triton_quantize import stage_token
from tests.support.device import CPU, Model, SwiGLU, random_model, twin

pytestmark = [pytest.mark.slow, pytest.mark.skipif(native is None, reason="the C++ kernels are not built")]


@pytest.fixture
def model() -> Model:
    return random_model(layers=2, experts=8, top_k=4, hidden=128, width=72)


@pytest.fixture
def computing(model: Model) -> Iterator[HostCompute]:
    made = HostCompute(model.layout, model.shapes, SwiGLU(), model.arena, model.top_k, CPU, threads=2, tokens=4)
    yield made
    made.close()


def step(
    experts: DeviceExperts, model: Model, layer: int, x: torch.Tensor, live: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens through ``route`` and ``run``: output, routing weights and chosen experts."""
    tokens, router = len(x), Router(model.num_experts, model.top_k, normalize=True)
    logits = x @ model.routers[layer].T
    weights, out = torch.zeros(tokens, model.top_k), torch.zeros_like(x)
    stage_kernel[(tokens,)](x, experts.state.staged, cols=x.shape[1], groups=x.shape[1] // 64)
    there = torch.tensor([live or tokens], dtype=torch.int32)
    experts.route(layer, logits, x @ model.routers[-1].T, x, weights, router, there)
    experts.run(layer, weights, out)
    return out, weights, torch.topk(logits, model.top_k).indices


@triton.jit  # type: ignore[untyped-decorator]
def stage_kernel(hidden: Any, staged: Any, cols: tl.constexpr, groups: tl.constexpr) -> None:
    stage_token(hidden, staged, tl.program_id(0), cols, groups, 3, 64)


@pytest.mark.parametrize("host_compute", [1.0, 0.5])
def test_same_sums_as_the_twin_and_only_the_links_misses_move_in(model: Model, computing: HostCompute, host_compute: float) -> None:
    experts = model.experts(10, DeviceOptions(limit=1, host_compute=host_compute), host_compute=computing)
    random = torch.Generator().manual_seed(3)
    hosted = 0
    for _ in range(4):
        for layer in (0, 1):
            x = torch.randn(1, 128, generator=random)
            before = {expert for held, expert, _ in experts.state.tables.residents() if held == layer}
            out, weights, index = step(experts, model, layer, x)
            after = {expert for held, expert, _ in experts.state.tables.residents() if held == layer}
            missing = set(index[0].tolist()) - before
            assert len(missing - after) == len(missing) - int(len(missing) * (1 - host_compute))
            hosted += len(missing - after)
            assert torch.equal(out, twin(model, layer, x, index, weights))
    assert hosted == experts.state.tables.hosted() > 0
    counted = experts.state.counters()
    assert counted.bytes_read == (counted.misses - hosted + counted.prefetched) * model.layout.length
    experts.state.tables.check_integrity()


@pytest.mark.parametrize("host_compute", [0.5, 0.0])
def test_misses_of_several_tokens_are_served_once(model: Model, computing: HostCompute, host_compute: float) -> None:
    """Of four rows the last is idle. All experts are wanted and a layer has five slots, so the link needs spare ones too."""
    experts = model.experts(10, DeviceOptions(limit=1, host_compute=host_compute), num_staging=4, host_compute=computing)
    assert experts.most_tokens(16) == 16
    random = torch.Generator().manual_seed(7)
    for layer in (0, 1):
        before = experts.state.counters().misses
        x = torch.randn(4, 128, generator=random)
        out, weights, index = step(experts, model, layer, x, live=3)
        assert torch.equal(out[:3], twin(model, layer, x[:3], index[:3], weights[:3]))
        assert not out[3].any()
        wanted = len(set(index[:3].flatten().tolist()))
        assert wanted - 5 <= experts.state.counters().misses - before <= wanted
    experts.state.tables.check_integrity()
    assert (experts.state.tables.hosted() > 0) == (host_compute > 0)


def test_what_the_host_computes_moves_in_behind_the_step(model: Model, computing: HostCompute) -> None:
    options = DeviceOptions(limit=0, host_compute=1.0, admit_every=2)
    experts = model.experts(10, options, host_compute=computing)
    tables, x = experts.state.tables, torch.randn(1, 128, generator=torch.Generator().manual_seed(5))
    counted = []
    for _ in range(9):  # each layer misses at most four, and every other token is its turn
        before = experts.state.counters()
        for layer in (0, 1):
            out, weights, index = step(experts, model, layer, x)
            assert torch.equal(out, twin(model, layer, x, index, weights))
        counted.append(experts.state.counters().since(before))
    tables.check_integrity()
    assert all(spent.prefetched <= 1 for spent in counted), "a layer in two admits"
    assert counted[0].misses > 0
    assert counted[-1].misses == 0
    assert sum(spent.prefetched for spent in counted) == sum(spent.prefetch_used for spent in counted) == counted[0].misses
    for layer, expert, slot in tables.residents():
        assert experts.state.pool.slot(slot)[: model.layout.length].equal(model.arena.blob(layer * 8 + expert))


def test_threads_end_before_the_memory_that_they_read_goes(model: Model) -> None:
    """A model that is dropped without being closed: the threads look at the mailbox until they are ended."""
    for _ in range(20):
        made = HostCompute(model.layout, model.shapes, SwiGLU(), model.arena, model.top_k, CPU, threads=2)
        mailbox = weakref.ref(made._mail)
        del made
        assert mailbox() is None


def test_a_host_without_every_expert_is_refused(model: Model, computing: HostCompute) -> None:
    state = model.experts(10).state
    other = SimpleNamespace(bytes=model.arena.bytes)
    with pytest.raises(ValueError, match="every expert"):
        DeviceState(
            state.layouts, other, state.pool, state.tables, state.routers, top_k=4,  # type: ignore[arg-type]
            options=DeviceOptions(host_compute=0.5), host_compute=computing,
        )  # fmt: skip


def test_experts_without_a_kernel_are_refused() -> None:
    model = random_model("lossless", torch.float32)
    with pytest.raises(UnsupportedModelError, match="F32"):
        HostCompute(model.layout, model.shapes, SwiGLU(), model.arena, model.top_k, CPU)
