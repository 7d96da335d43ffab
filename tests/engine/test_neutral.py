"""Settings of torch that would change numbers: set aside while loading, refused in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.engine.prepare import plan, store_for
from fate_moe.errors import ConfigError
from fate_moe.kernels.modes import neutral
from tests.support.engines import load_model

IDS = torch.tensor([[3, 4, 5, 6]])


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype": default_dtype,
    "default device": default_device,
    "autocast": lambda: torch.autocast("cpu"),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_loaded_under_a_setting_is_the_same(
    setting: str, checkpoint: Callable[[str], Path], loaded: Callable[..., Any]
) -> None:
    store = store_for(checkpoint("qwen3_moe"), "lossless")
    with SETTINGS[setting](), neutral():
        model = load_model(store)
    assert torch.equal(model(IDS).logits, loaded("qwen3_moe")(IDS).logits)
    model.fate.close()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_plan_made_under_a_setting_is_the_same(setting: str, checkpoint: Callable[[str], Path]) -> None:
    with SETTINGS[setting]():
        made = plan(checkpoint("olmoe"), ram="4GiB")
    assert made.dense_bytes == plan(checkpoint("olmoe"), ram="4GiB").dense_bytes


@pytest.mark.parametrize("setting", ["default dtype", "default device", "inference"])
def test_a_pass_under_a_harmless_setting_is_the_same(setting: str, loaded: Callable[..., Any]) -> None:
    model = loaded("qwen3_moe")
    wanted = model(IDS).logits
    with SETTINGS[setting]():
        assert torch.equal(model(IDS).logits, wanted)


def test_a_pass_with_rounded_products_is_refused(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen3_moe")
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ConfigError, match="set it to 'highest'"):
            model(IDS)
    finally:
        torch.set_float32_matmul_precision("highest")
