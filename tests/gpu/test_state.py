"""What decode and prefill share: refusals, and an end that says so."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fate_moe.errors import ClosedModelError
from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.tables import ResidencyTables
from tests.support.device import CPU, random_model


def test_slots_that_two_experts_have_are_found() -> None:
    tables = ResidencyTables([2, 3], 4, CPU)
    tables.check_integrity()
    tables.slot_of[1, 3] = 3
    with pytest.raises(RuntimeError, match=r"layer 1 has slots \[2, 3, 3, 4\] instead of 2 to 4"):
        tables.check_integrity()


def test_layers_are_whole_or_not() -> None:
    state = random_model(layers=2, experts=8).experts(12, DeviceOptions(num_whole=1, limit=0), num_staging=2).state
    assert [state.is_whole(layer) for layer in (0, 1)] == [False, False]  # a whole layer would be more than half of the slots
    state = random_model(layers=2, experts=4).experts(8).state
    assert [state.is_whole(layer) for layer in (0, 1)] == [True, True]
    for layer, expert, slot in state.tables.residents():
        assert torch.equal(state.pool.slot(slot), random_model(layers=2, experts=4).arena.blob(layer * 4 + expert))


def test_a_closed_model_says_so() -> None:
    state = random_model().experts(4).state
    state.host.check()
    state.close()
    with pytest.raises(ClosedModelError, match="load it again"):
        state.host.check()
