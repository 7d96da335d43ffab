"""Running models without a tokenizer, on the CPU and on a simulated GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fate_moe.config import OffloadConfig
from fate_moe.engine.load import build
from fate_moe.engine.prepare import prepare

CPU = torch.device("cpu")


def load_model(store: Path, **options: Any) -> Any:
    """load() without the tokenizer, which tiny checkpoints do not have."""
    config = OffloadConfig.from_options({"context_length": 256, **options})
    prepared = prepare(store)
    return build(prepared, prepared.plan(config), config)


def simulated_gpu(
    store: Path, slots: int | None = None, places: int | None = None, context_length: int = 24, **options: Any
) -> Any:
    """The model of ``store`` with so many slots in "VRAM" and in RAM (None: all experts), its kernels interpreted on the CPU."""
    from fate_moe.engine.device_budget import make_device_plan
    from fate_moe.gpu.device import Gpu
    from fate_moe.registry import PRESETS

    config = OffloadConfig(device="cuda", context_length=context_length, **options)
    prepared = prepare(store)
    plan = make_device_plan(prepared.footprint(), config, Gpu("simulated", CPU, 1 << 30, 1 << 30), PRESETS[config.preset].device)
    plan = replace(plan, num_slots=slots or plan.num_slots, num_host_slots=places or plan.num_host_slots)
    return build(prepared, plan, config, device=CPU)
