"""Two budgets: lines add up, refusals name the smallest budget that works, and it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fate_moe.adapter.meta_model import build_meta_model, expert_stacks
from fate_moe.config import OffloadConfig
from fate_moe.engine.budget import Footprint, footprint
from fate_moe.engine.device_budget import DevicePlan, make_device_plan, min_slots
from fate_moe.errors import BudgetError, ConfigError
from fate_moe.gpu.device import Gpu
from fate_moe.gpu.options import DeviceOptions
from fate_moe.registry import PRESETS

CONFIG = Path(__file__).parents[1] / "data" / "configs" / "Qwen3-30B-A3B"
GPU = Gpu("simulated", torch.device("cpu"), 24 << 30, 20 << 30)


@pytest.fixture
def needs(checkpoint: Callable[[str], Path]) -> Footprint:
    """Qwen3-30B-A3B's, at int4."""
    model = build_meta_model(CONFIG)
    return footprint(model, expert_stacks(model), "int4")


def small(needs: Footprint) -> Footprint:
    """The same with experts of 4096 bytes."""
    return replace(needs, slots=tuple(of._replace(slot_bytes=4096) for of in needs.slots))


def planned(needs: Footprint, **options: Any) -> DevicePlan:
    config = OffloadConfig(device="cuda", **options)
    return make_device_plan(needs, config, GPU, PRESETS[config.preset].device)


def test_lines_add_up(needs: Footprint) -> None:
    plan = planned(needs, vram="16GiB", ram="8GiB")
    rows = plan.rows()
    for tier, budget in (("VRAM", plan.vram_budget_bytes), ("RAM", plan.budget_bytes)):
        assert sum(size for what, size, _ in rows if what.startswith(f"{tier}:")) == budget
    assert plan.vram_left_bytes < plan.slot_bytes
    assert plan.num_slots < needs.num_experts
    assert plan.reads_disk
    assert plan.as_dict()["expert_cache_bytes"] == plan.num_slots * plan.slot_bytes
    matrices = 48 * (2048 * 128 * (32 + 4 + 4) + 32 * 128 * 2048) + 151936 * 2048  # attention and head: a byte, and scales
    numbers = 48 * (2 * 128 * 2048 + 2 * 2048 + 2 * 128) + 151936 * 2048 + 2048  # routers twice, norms, embedding
    assert needs.device_bytes == matrices + matrices // 64 * 4 + 2 * numbers


def test_dense_weights_of_four_bits_take_a_byte_in_vram(needs: Footprint) -> None:
    model = build_meta_model(CONFIG)
    stacks = expert_stacks(model)
    four, none = (footprint(model, stacks, "int4", dense_precision=name) for name in ("int4", "lossless"))
    assert four.device_bytes == needs.device_bytes
    assert four.dense_bytes < needs.dense_bytes
    assert none.device_bytes > 1.5 * needs.device_bytes


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
    plan = planned(small(needs), ram="16GiB")
    assert plan.num_slots == plan.num_host_slots == needs.num_experts
    assert not plan.reads_disk
    assert "not read after loading" in str(plan.rows())
    assert "6144/6144 expert slots" in plan.line()


def test_the_hosts_share_needs_every_expert_in_ram(needs: Footprint) -> None:
    assert planned(needs, vram="4GiB", ram="8GiB").host_compute == 0.0
    whole = small(needs)
    plan = planned(whole, vram="4GiB", ram="8GiB", host_compute="50%", expert_cache="50%")
    assert plan.host_compute == 0.5
    assert "the CPU computes 50% of" in plan.line()
    assert "the CPU computes 50% of" in str(plan.rows())
    with pytest.raises(BudgetError, match=r"every expert in RAM.* give --ram \d+MiB") as caught:
        planned(needs, vram="4GiB", ram="8GiB", host_compute=0.5)
    with patch("fate_moe.engine.device_budget.available_memory", return_value=64 << 30):
        assert planned(needs, vram="4GiB", ram=caught.value.smallest_bytes + (4 << 20), host_compute=0.5).host_compute == 0.5


def test_what_the_host_computes_is_measured_while_loading_by_default(needs: Footprint) -> None:
    plan = planned(small(needs), ram="8GiB", expert_cache="50%")
    assert plan.host_compute is None
    assert "the CPU computes those of them that it has sooner than the link" in plan.line()
    assert "the CPU" not in planned(small(needs), ram="8GiB").line(), "every expert is in VRAM"


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
        {"host_compute": "0.5"},
        {"vram": "1GiB", "host_compute": "half"},
        {"vram": "1GiB", "host_compute": 1.5},
    ):
        with pytest.raises(ConfigError):
            OffloadConfig(**wrong)
    assert all(preset.device for preset in PRESETS.values())
