"""Prediction in C++ (csrc/chances.h, prefetcher.h) beside its twins in Python, driven with the same inputs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.core import ExpertId, Predictor
from fate_moe.kernels.extension import native
from fate_moe.kernels.native import DTYPES
from fate_moe.memory.decayed import Decayed
from fate_moe.memory.residency import Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.predict.gates import FittedGates
from fate_moe.predict.native_prefetcher import NativePrefetcher, make_prefetcher, native_chances
from fate_moe.predict.predictors import Known
from fate_moe.predict.rule import WASTE, num_reads
from fate_moe.registry import make_policy, make_predictor
from tests.support.sources import MemorySource, SourceDouble, marked_blobs

pytestmark = pytest.mark.skipif(native is None, reason="the extension is not built")

LAYERS, EXPERTS, HIDDEN, TOP_K = 4, 24, 128, 3
SIZES = [EXPERTS, 12, EXPERTS, EXPERTS]


def known(policy: Any = None, *, fitted: bool = False, dtype: torch.dtype = torch.bfloat16) -> Known:
    generator = torch.Generator().manual_seed(1)
    routers = [torch.randn(size, HIDDEN, generator=generator).to(dtype) for size in SIZES]
    gates: list[list[torch.Tensor | None]] = [
        [torch.randn(size, HIDDEN + 1, generator=generator) for size in SIZES],
        [None] * LAYERS,
    ]
    return Known(
        [None] * LAYERS,
        linear=routers,
        norms=torch.rand(LAYERS, HIDDEN, generator=generator) + 0.5,
        fitted=FittedGates(*gates) if fitted else None,
        history=getattr(policy, "statistics", None),
    )


def native_predict(chances: Any, layer: int, x: torch.Tensor, ahead: int) -> list[tuple[int, float]]:
    found: list[tuple[int, float]] = chances.predict(layer, x.data_ptr(), DTYPES[x.dtype], len(x), ahead)
    return found


@pytest.mark.parametrize(
    ("name", "own_history", "fitted", "dtype"),
    [
        ("combined", True, False, torch.bfloat16),
        ("combined", True, True, torch.bfloat16),
        ("combined", False, True, torch.float32),
        ("cross-layer-norm", False, False, torch.bfloat16),
    ],
)
def test_the_same_experts_with_the_same_probabilities(name: str, own_history: bool, fitted: bool, dtype: torch.dtype) -> None:
    """Over tokens enough that probabilities and weights are learned several times; prompts in between."""
    policies = [Decayed(SIZES) if own_history else None for _ in range(2)]
    twin, other = (make_predictor(name, SIZES, TOP_K, known(policy, fitted=fitted), 2) for policy in policies)
    chances = native_chances(other)
    assert chances is not None
    generator = torch.Generator().manual_seed(2)
    told = 0
    for token in range(150):
        num_rows = 5 if token % 40 == 7 else 1
        for layer in range(-1, LAYERS - 1):
            x = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
            for ahead in range(1, min(2, LAYERS - 1 - layer) + 1):
                want = twin.predict(layer + ahead, x, ahead)
                assert native_predict(chances, layer + ahead, x, ahead) == want
                told += len(want)
            # What the next layer chooses follows its scores, more or less.
            likely = [expert for expert, _ in twin.predict(layer + 1, x, 1)][: TOP_K - 1]
            size = SIZES[layer + 1]
            routed = list(dict.fromkeys([*likely, *torch.randperm(size, generator=generator)[:TOP_K].tolist()]))[:TOP_K]
            assert native_predict(chances, layer + 1, x, 1) == twin.predict(layer + 1, x, 1), "asking twice changes nothing"
            for policy in policies:
                if policy is not None:
                    policy.routed(layer + 1, routed)
            twin.observe(layer + 1, routed)
            chances.observe(layer + 1, routed)
    assert told > 1000


@given(
    st.lists(st.floats(0, 1), max_size=9).map(lambda chances: sorted(chances, reverse=True)),
    st.floats(0, 0.1),
    st.floats(1e-6, 0.1),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_as_many_reads(chances: list[float], layer_seconds: float, read_seconds: float, ahead: int, queued: int) -> None:
    want = num_reads(chances, layer_seconds, read_seconds, ahead=ahead, queued=queued)
    assert native.num_reads(chances, layer_seconds, read_seconds, ahead, queued, WASTE) == want


@pytest.mark.parametrize(
    "others",
    [
        make_predictor("temporal", SIZES, TOP_K, known()),
        make_predictor("recursive", SIZES, TOP_K, known()),
        make_predictor("cross-layer-norm", SIZES, TOP_K, known(dtype=torch.float32)),
        make_predictor("combined", SIZES, TOP_K, replace(known(), linear=None)),
        make_predictor("forecast", SIZES, TOP_K, replace(known(), forecast=[torch.zeros(s, 2 * HIDDEN + 1) for s in SIZES])),
    ],
)
def test_other_predictors_go_the_slow_way(others: Predictor) -> None:
    assert native_chances(others) is None


def test_what_is_read_ahead_is_what_the_rule_says() -> None:
    policy = make_policy("co-activation", 6, SIZES)
    predictor = make_predictor("combined", SIZES, TOP_K, known(policy), 1)
    experts = [ExpertId(layer, expert) for layer, size in enumerate(SIZES) for expert in range(size)]
    source = SourceDouble(MemorySource(marked_blobs(experts, 4096)))
    source.seconds = 0.001
    residency: Any = Residency(source, SlotArena((24, 4096)), policy, blob_bytes=dict.fromkeys(experts, 4096))
    prefetcher = make_prefetcher(residency, predictor, LAYERS, 1)
    assert isinstance(prefetcher, NativePrefetcher)
    prefetcher.embedded(torch.zeros(9, HIDDEN, dtype=torch.bfloat16))
    prefetcher.native.watch(residency.native)
    generator, seen = torch.Generator().manual_seed(3), set[int]()
    for token in range(40):
        prefetcher._begin()
        for layer in range(LAYERS):
            residency.wait_idle()
            resident = set(residency.resident())
            read_seconds, x = residency.read_seconds, torch.randn(1, HIDDEN, generator=generator).bfloat16()
            routed = torch.randperm(SIZES[layer], generator=generator)[:TOP_K].tolist()
            source.gate.clear()  # nothing arrives between the question and the answer
            if layer + 1 < LAYERS:
                layer_seconds = prefetcher.layer_seconds(1)
                queued = prefetcher.native.look_ahead(layer, x.data_ptr(), DTYPES[x.dtype], 1)
                absent = [chance for expert, chance in prefetcher.prediction_of(layer + 1) if (layer + 1, expert) not in resident]
                most = num_reads(absent, layer_seconds, read_seconds, ahead=1) if read_seconds else 1
                assert queued == min(most, len(absent)), (token, layer)
                seen.add(queued)
            residency.native.acquire(layer, routed, [1] * TOP_K, 1, x.data_ptr(), 0, 0)
            source.gate.set()
            left = TOP_K
            while left:
                left -= len(residency.native.arrived(TOP_K))
            residency.native.end()
            time.sleep(0.0005 * (token % 3))
    assert residency.counters.prefetched > 0
    assert residency.counters.predicting_seconds > 0
    assert len(seen) > 1
    residency.check_integrity()
    residency.close()
