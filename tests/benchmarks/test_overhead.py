"""Time is charged to the part that spends it, and a renamed function is noticed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.overhead import STEP, Clock, decode, instrument
from fate_moe import load
from fate_moe.kernels.native import native

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


def test_a_step_of_all_layers_is_one_part() -> None:
    """And it is most of a token, whatever else has a timer."""
    clock = Clock()
    with load() as (model, _), instrument(model, clock):
        decode(model, PROMPT, 8, clock.start)
    assert clock.calls[STEP] == 7
    assert clock.seconds[STEP] > 0.3 * sum(clock.seconds.values())
    assert {"KV cache", "generate()", "runtime"} <= clock.seconds.keys()


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


@pytest.mark.parametrize("name", ["step", "combine"])
def test_a_name_that_is_gone_raises(loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = loaded("qwen2_moe")
    monkeypatch.delattr(native, name)
    with pytest.raises(AttributeError, match=name), instrument(model, Clock()):
        pass
