"""Never slower than not trying: nothing is copied ahead where one copy takes the time of many layers."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.prefetch_trial import measured, prefetch_limit
from tests.support.device import random_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("copy", "layer", "limit"),
    [(57e-6, 56e-6, 1), (100e-6, 84e-6, 1), (2e-3, 0.25e-3, 0)],
    ids=["Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B", "Mixtral-8x7B"],
)
def test_the_measured_geometries(copy: float, layer: float, limit: int) -> None:
    assert prefetch_limit(1, copy, layer) == limit
    assert prefetch_limit(3, copy, layer) == 3 * limit
    assert prefetch_limit(0, copy, layer) == 0


def test_both_times_are_measured() -> None:
    model = random_model(layers=2, experts=8)
    experts = model.experts(6)
    experts.state.options = replace(experts.state.options, limit=0)
    assert prefetch_limit(2, *measured(experts, lambda: time.sleep(1.0))) == 2
    assert prefetch_limit(2, *measured(experts, lambda: None)) == 0
    staged = experts.state.pool.slot(experts.state.pool.num_slots)[: model.layout.length]
    assert staged.equal(model.arena.blob(0)), "the copy that was measured is not one of an expert"
    experts.state.tables.check_integrity()
    assert DeviceOptions().limit == 1
