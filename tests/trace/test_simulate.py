"""The time model by hand, the bound, and the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe.core import ExpertId
from fate_moe.errors import ConfigError
from fate_moe.memory.policies import LRU
from fate_moe.registry import POLICIES
from fate_moe.store.learned import Gates
from fate_moe.trace.schema import RoutingTrace, read_trace, write_trace
from fate_moe.trace.simulate import Link, simulate
from fate_moe.trace.virtual import VirtualResidency

SLOW = Link(bytes_per_second=1000.0, expert_bytes=1000, layer_seconds=0.5)  # a read takes a second


def trace_of(experts: Any, num_experts: int = 8, **extras: Any) -> RoutingTrace:
    """[N, L, k]."""
    array = np.array(experts, np.uint8)
    sizes = np.full(array.shape[1], num_experts, np.int64)
    return RoutingTrace(array, np.ones(array.shape, np.float16), np.array([0, len(array)]), sizes, extras)


def random_trace(seed: int, tokens: int = 60, layers: int = 3, k: int = 2, num_experts: int = 8) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(num_experts, 0.5), layers) + 1e-3
    return trace_of(
        [
            [rng.choice(num_experts, k, replace=False, p=popularity[layer] / popularity[layer].sum()) for layer in range(layers)]
            for _ in range(tokens)
        ]
    )


def test_demand_reads_by_hand() -> None:
    """Two misses take two seconds, a layer half a second; the second token finds one of two."""
    row = simulate(trace_of([[[0, 1]], [[0, 2]]]), "lru", "none", 0.5, SLOW)
    assert (row.miss_rate, row.ready_on_time, row.bytes_per_token) == (0.75, 0.25, 1500)
    assert row.stall_seconds == pytest.approx(3.0)
    assert row.tokens_per_second == pytest.approx(2 / 4.0)


def test_overlap_hides_a_wait() -> None:
    link = Link(1000.0, 1000, 0.5, overlap_seconds=0.4)
    row = simulate(trace_of([[[0]], [[1]], [[1]]]), "lru", "none", 0.25, link)
    assert row.stall_seconds == pytest.approx(2 * 0.6)
    assert row.tokens_per_second == pytest.approx(3 / (2 * 0.6 + 3 * 0.5))


def test_latency_delays_use_and_not_the_next_read() -> None:
    """Two misses: the link is busy for two seconds, the second expert is ready a quarter later; a lone one after 1.25."""
    link = Link(1000.0, 1000, 0.5, latency_seconds=0.25)
    row = simulate(trace_of([[[0, 1]], [[0, 2]]]), "lru", "none", 0.5, link)
    assert row.stall_seconds == pytest.approx(2.25 + 1.25)


def test_skipped_tokens_warm_up_and_do_not_count() -> None:
    row = simulate(trace_of([[[0]], [[0]], [[1]]]), "lru", "none", 0.25, SLOW, skip=1)
    assert (row.num_tokens, row.miss_rate) == (2, 0.5)
    assert row.stall_seconds == pytest.approx(1.0)


def residency(num_slots: int = 4) -> VirtualResidency:
    return VirtualResidency(LRU(), num_slots, 1.0, 1000)


def test_a_prefetch_in_time_is_a_hit_one_begun_is_in_flight_one_queued_is_a_miss() -> None:
    virtual = residency()
    assert virtual.prefetch([ExpertId(1, 0), ExpertId(1, 1), ExpertId(1, 2)]) == 3
    virtual.now = 1.5  # the first has arrived, the second is half done, the third has not begun
    assert virtual.acquire(1, [0, 1, 2]) == [0, 1, 2]
    assert virtual.now == pytest.approx(3.0)  # the rest of the second, then the third
    assert virtual.counters.stall_seconds == pytest.approx(1.5)
    assert virtual.counters.bytes_read == 3000
    assert (virtual.counters.prefetched, virtual.counters.prefetch_used) == (2, 2)


def test_a_wrong_prefetch_delays_by_what_is_left_of_it_and_no_more() -> None:
    virtual = residency()
    virtual.prefetch([ExpertId(1, 5), ExpertId(1, 6)])
    virtual.now = 0.25
    assert virtual.acquire(1, [0]) == [2]
    assert virtual.now == pytest.approx(2.0)
    virtual.now = 5.0
    assert virtual.missing([ExpertId(1, 6)]) == [True], "it was still queued and is dropped"


def test_prefetch_waits_for_demand() -> None:
    virtual = residency()
    virtual.prefetch([ExpertId(2, 0)])
    virtual.acquire(0, [0, 1])  # at time 0 nothing has begun: demand goes first, until 2
    virtual.now = 2.5
    virtual.acquire(2, [0])
    assert virtual.counters.in_flight == 1
    assert virtual.now == pytest.approx(3.0)


def test_a_prefetch_takes_no_fresh_expert() -> None:
    virtual = residency(num_slots=1)
    virtual.acquire(1, [0])
    virtual.prefetch([ExpertId(1, 0), ExpertId(1, 1)])
    virtual.now += 5
    assert virtual.acquire(1, [0]) == [0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), slots=st.integers(2, 20), policy=st.sampled_from([*POLICIES, "best"]))
def test_no_policy_beats_belady(seed: int, slots: int, policy: str) -> None:
    trace = random_trace(seed)
    bound = simulate(trace, "belady", "none", slots / 24, SLOW)
    row = simulate(trace, policy, "none", slots / 24, SLOW)
    assert bound.miss_rate <= row.miss_rate + 1e-9
    assert row.lookups == 60 * 3 * 2
    assert row.bytes_per_token == pytest.approx(row.miss_rate * 6 * 1000)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), predictor=st.sampled_from(["temporal", "activation-path"]))
def test_counters_of_prefetches_agree(seed: int, predictor: str) -> None:
    row = simulate(random_trace(seed), "best", predictor, 0.5, Link(20000.0, 1000, 0.5))
    assert row.prefetch_used <= row.prefetched
    misses = round(row.miss_rate * row.lookups)
    assert row.bytes_per_token * row.num_tokens == pytest.approx(1000 * (misses + row.prefetched))


def test_belady_by_hand() -> None:
    """0 1 2 0 1 2 with two slots: 2 takes the place of 1, which is needed later than 0."""
    row = simulate(trace_of([[[e]] for e in (0, 1, 2, 0, 1, 2)]), "belady", "none", 0.25, SLOW)
    assert row.miss_rate == pytest.approx(4 / 6)


def test_an_oracle_misses_only_what_the_link_has_no_time_for() -> None:
    """Layer 0, predicted as soon as the token is known, always chooses the same; what no layer chooses is never read."""
    trace = random_trace(2)
    trace.experts[:, 0] = [0, 1]
    link = Link(1000.0, 500, 0.5)  # half a second for both
    quick, bound = simulate(trace, "lru", "oracle", 0.5, Link(1000.0, 100, 0.5)), simulate(trace, "lru", "oracle", 0.5, link)
    assert quick.ready_on_time > 0.99
    assert quick.prefetched == quick.prefetch_used
    assert simulate(trace, "lru", "none", 0.5, link).ready_on_time < bound.ready_on_time < 1


def test_what_needs_router_inputs_says_so() -> None:
    with pytest.raises(ConfigError, match="--router-inputs"):
        simulate(random_trace(0), "lru", "combined", 0.5, SLOW)
    with pytest.raises(ConfigError, match="below one token"):
        simulate(random_trace(0), "lru", "none", 0.01, SLOW)


@pytest.mark.parametrize("predictor", ["cross-layer", "cross-layer-probability", "combined", "learned", "forecast", "recursive"])
def test_gates_run_on_recorded_inputs(predictor: str) -> None:
    """A router that sees the true router input one layer early knows all: with a fast link nearly everything is on time."""
    import torch

    rng = np.random.default_rng(3)
    routers = rng.normal(size=(3, 8, 6)).astype(np.float32)
    inputs = np.repeat(rng.normal(size=(300, 1, 6)), 3, axis=1).astype(np.float16)  # the same in all layers
    chosen = np.argsort(-np.einsum("nld,led->nle", inputs.astype(np.float32), routers), axis=2)[:, :, :2]
    trace = trace_of(chosen, router_inputs=inputs, embeddings=inputs[:, 0], routers=routers)
    matrices = [torch.nn.functional.pad(torch.from_numpy(router), (0, 1)) for router in routers]
    forecast = [torch.cat([matrix[:, :-1], torch.zeros(8, 6), matrix[:, -1:]], 1) for matrix in matrices]
    gates = Gates([list(matrices), [None, *matrices[1:]]], forecast)
    fast = Link(1e6, 1000, 0.5)
    without = simulate(trace, "best", "none", 0.4, fast, skip=200)
    row = simulate(trace, "best", predictor, 0.4, fast, skip=200, gates=gates)
    assert row.ready_on_time > without.ready_on_time + 0.1


def test_looking_further_ahead_hides_reads_that_take_longer_than_a_layer() -> None:
    """All layers choose alike and gates know it: reads that take 1.6 layers are hidden two layers ahead, not one layer ahead."""
    import torch

    rng = np.random.default_rng(4)
    routers = rng.normal(size=(6, 8, 6)).astype(np.float32)
    inputs = np.repeat(rng.normal(size=(400, 1, 6)), 6, axis=1).astype(np.float16)
    chosen = np.argsort(-np.einsum("nld,led->nle", inputs.astype(np.float32), routers), axis=2)[:, :, :1]
    trace = trace_of(chosen, router_inputs=inputs, embeddings=inputs[:, 0], routers=routers)
    gates = Gates([[torch.nn.functional.pad(torch.from_numpy(router), (0, 1)) for router in routers]] * 3, [])
    slow = Link(1000, 800, 0.5)
    near, far = (simulate(trace, "best", "learned", 0.5, slow, skip=200, gates=gates, look_ahead=ahead) for ahead in (1, 3))
    assert far.stall_seconds < 0.8 * near.stall_seconds


def test_schema_round_trip(tmp_path: Path) -> None:
    trace = trace_of([[[0, 1]], [[2, 3]]], stall=np.zeros((2, 1), np.float32))
    write_trace(tmp_path / "t.npz", trace)
    again = read_trace(tmp_path / "t.npz")
    assert np.array_equal(again.experts, trace.experts)
    assert again.start.tolist() == [0, 2]
    assert again.extras["stall"].shape == (2, 1)
    assert again.first(1).num_tokens == 1


def test_published_traces_are_read(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "old.npz", experts=np.array([[[30, 1]]], np.uint8), probs=np.ones((1, 1, 2), np.float16), start=np.array([0, 1])
    )
    assert read_trace(tmp_path / "old.npz").num_experts.tolist() == [32]


def test_names_from_before_0_2_are_read(tmp_path: Path) -> None:
    """The array of what routers saw, and a predictor that was renamed."""
    inputs = np.arange(4, dtype=np.float16).reshape(1, 1, 4)
    np.savez(
        tmp_path / "old.npz",
        experts=np.array([[[3, 1]]], np.uint8),
        probs=np.ones((1, 1, 2), np.float16),
        start=np.array([0, 1]),
        gate_inputs=inputs,
        meta=np.array(json.dumps({"predictor": "cross-layer-calibrated", "policy": "lru", "slots": 7})),
    )
    trace = read_trace(tmp_path / "old.npz")
    assert np.array_equal(trace.extras["router_inputs"], inputs)
    assert trace.meta == {"predictor": "cross-layer-probability", "policy": "lru", "slots": 7}
    write_trace(tmp_path / "new.npz", trace)
    with np.load(tmp_path / "new.npz") as file:
        assert "router_inputs" in file.files
        assert "gate_inputs" not in file.files


@pytest.mark.parametrize(
    "change",
    [
        {"experts": np.zeros((2, 3), np.uint8)},
        {"experts": np.zeros((2, 1, 2), np.uint8)},  # chosen twice
        {"experts": np.array([[[0, 99]], [[1, 2]]], np.uint8)},
        {"start": np.array([0, 3])},
        {"version": np.int64(2)},
        {"probs": np.ones((2, 1, 1), np.float16)},
        {"meta": np.array("{")},
        {"stall": np.zeros((2, 2), np.float32)},
        {"lookups": np.zeros((2, 1, 3), np.uint8)},
        {"seconds": np.zeros(2, np.float32)},
        {"predicted": np.zeros((2, 1, 3), np.float16)},  # fewer experts than there are
        {"router_inputs": np.zeros((2, 1, 4), np.float16), "routers": np.zeros((1, 4, 5), np.float32)},
        {"norms": np.array([["a"]])},
        {"meta": np.array("[]")},
    ],
)
def test_damaged_traces_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    whole = {
        "experts": np.array([[[0, 1]], [[1, 2]]], np.uint8),
        "probs": np.ones((2, 1, 2), np.float16),
        "start": np.array([0, 2]),
        "num_experts": np.array([4]),
        "meta": np.array("{}"),
    }
    np.savez(tmp_path / "t.npz", **{**whole, **change})
    with pytest.raises(ConfigError, match="trace"):
        read_trace(tmp_path / "t.npz")
    (tmp_path / "u.npz").write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match="fate trace"):
        read_trace(tmp_path / "u.npz")
