"""Two budgets: lines add up, refusals name the smallest budget that works, and it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.config import OffloadConfig
from fate_moe.errors import BudgetError, ConfigError
from fate_moe.gpu.device import Gpu
from fate_moe.gpu.options import DeviceOptions, device_options
from fate_moe.gpu.plan import DevicePlan, make_device_plan, min_slots
from fate_moe.planner import Footprint, footprint
from fate_moe.skeleton import build_skeleton, expert_stacks

GPU = Gpu("simulated", torch.device("cpu"), 24 << 30, 20 << 30)


@pytest.fixture
def needs(checkpoint: Callable[[str], Path]) -> Footprint:
    """Qwen3-30B-A3B's, at int4."""
    model = build_skeleton(Path(__file__).parents[1] / "data" / "configs" / "Qwen3-30B-A3B")
    return footprint(model, expert_stacks(model), "int4")


def planned(needs: Footprint, **options: Any) -> DevicePlan:
    config = OffloadConfig(device="cuda", **options)
    return make_device_plan(needs, config, GPU, device_options(config.preset))


def test_lines_add_up(needs: Footprint) -> None:
    plan = planned(needs, vram="16GiB", ram="8GiB")
    rows = plan.rows()
    for tier, budget in (("VRAM", plan.vram_budget_bytes), ("RAM", plan.budget_bytes)):
        assert sum(size for what, size, _ in rows if what.startswith(f"{tier}:")) == budget
    assert plan.vram_left_bytes < plan.slot_bytes
    assert plan.num_slots < needs.num_experts
    assert plan.reads_disk
    assert plan.as_dict()["expert_cache_bytes"] == plan.num_slots * plan.slot_bytes
    weights = 48 * (2048 * 128 * (32 + 4 + 4) + 32 * 128 * 2048 + 128 * 2048 + 2 * 2048 + 2 * 128) + 2 * 151936 * 2048 + 2048
    assert needs.expanded_bytes == 2 * (weights + 48 * 128 * 2048)


def test_too_little_vram_names_the_smallest_that_works(needs: Footprint) -> None:
    with pytest.raises(BudgetError, match=r"at least --vram \d+MiB") as caught:
        planned(needs, vram="2GiB")
    smallest = planned(needs, vram=caught.value.smallest_bytes)
    assert smallest.num_slots >= min_slots(needs, DeviceOptions()) == 48 * 9
    assert smallest.num_staging >= 2
    with pytest.raises(BudgetError, match="more than the 20 GiB that are free"):
        planned(needs, vram="22GiB")
    with pytest.raises(BudgetError, match="needs at least 432"):
        planned(needs, vram="16GiB", expert_cache="5%")
    assert planned(needs, vram="16GiB", expert_cache="50%").num_slots == needs.num_experts // 2


def test_too_little_ram_names_the_smallest_that_works(needs: Footprint) -> None:
    with pytest.raises(BudgetError, match=r"at least --ram \d+MiB") as caught:
        planned(needs, ram="1GiB")
    plan = planned(needs, ram=caught.value.smallest_bytes + (4 << 20))  # this process may have grown meanwhile
    assert plan.num_host_slots >= needs.min_slots
    assert plan.left_bytes >= 0


def test_everything_fits(needs: Footprint) -> None:
    plan = planned(replace(needs, slot_bytes=4096), ram="16GiB")
    assert plan.num_slots == plan.num_host_slots == needs.num_experts
    assert not plan.reads_disk
    assert "not read after loading" in str(plan.rows())
    assert "6144/6144 expert slots" in plan.line()


def test_options_that_mean_nothing_are_errors() -> None:
    assert OffloadConfig(vram="auto").on_gpu
    assert OffloadConfig(device="cuda").on_gpu
    assert not OffloadConfig().on_gpu
    for wrong in (
        {"vram": "much"},
        {"device": "tpu"},
        {"device": "cpu", "vram": "1GiB"},
        {"vram": "1GiB", "predictor": "temporal"},
        {"device": "cuda", "precision_policy": "budget"},
    ):
        with pytest.raises(ConfigError):
            OffloadConfig(**wrong)
    with pytest.raises(ConfigError, match="choose one of best, fate, load-on-demand"):
        device_options("eap")
