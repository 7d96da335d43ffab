"""Time is charged to the part that spends it, and a renamed function is noticed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.overhead import Clock, decode, instrument
from fate_moe.memory.residency import Residency
from tests.support.sources import SourceDouble

PROMPT = torch.arange(1, 6)[None]


def test_the_innermost_function_is_charged() -> None:
    clock = Clock()
    inner = clock.charge("inner", lambda: time.sleep(0.02))

    def work() -> None:
        time.sleep(0.01)
        inner()

    outer = clock.charge("outer", work)
    clock.start()
    outer()
    assert clock.seconds["inner"] >= 0.02
    assert 0.01 <= clock.seconds["outer"] < 0.02 + clock.seconds["inner"]
    assert clock.calls == {"inner": 1, "outer": 1}


def test_waiting_is_charged_to_the_residency(loaded: Callable[..., Any]) -> None:
    """Every read takes 5 ms; the runtime, which asks for it, takes none of that."""
    model = loaded("qwen2_moe", policy="lru", predictor="none", expert_cache="25%")
    residency = model.fate.runtime.residency
    residency._source = SourceDouble(residency._source, 5e-3)
    clock = Clock()
    with instrument(model, clock):
        decode(model, PROMPT, 8, clock.start)
    assert clock.seconds["residency and policy"] > 0.02
    assert clock.seconds["runtime"] < 0.5 * clock.seconds["residency and policy"]
    assert {"prediction", "norms", "embedding"} <= clock.seconds.keys()


def test_timers_are_taken_off_again(loaded: Callable[..., Any]) -> None:
    model, clock = loaded("qwen2_moe"), Clock()
    attention = torch.nn.functional.scaled_dot_product_attention
    with instrument(model, clock):
        decode(model, PROMPT, 3)
        assert torch.nn.functional.scaled_dot_product_attention is not attention
    assert torch.nn.functional.scaled_dot_product_attention is attention
    clock.start()
    decode(model, PROMPT, 3)
    assert not clock.seconds


@pytest.mark.parametrize("name", ["wait_for", "unlock"])
def test_a_name_that_is_gone_raises(loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = loaded("qwen2_moe")
    monkeypatch.delattr(Residency, name)
    with pytest.raises(AttributeError, match=name), instrument(model, Clock()):
        pass
