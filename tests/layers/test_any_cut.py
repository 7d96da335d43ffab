"""Logits of a prompt are the same bits in any cut of it, from one call for all tokens to one call for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe.kernels.native import native
from fate_moe.layers.cpu_step import CpuStep
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.support.bits import assert_same
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model

pytestmark = pytest.mark.slow

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3")
LENGTH = 150


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model, everything quantized that may be."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny_checkpoint(request.param, folder / "checkpoint", torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
        model = load_model(convert(checkpoint, folder / "store", "int4"), expert_cache="50%")
        assert all(isinstance(layer.forward, CpuStep) for layer in model.model.layers)
        yield model
    model.fate.close()


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(1, 128, (1, length), generator=torch.Generator().manual_seed(length))


def logits_in(model: Any, tokens: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """[length, vocabulary], the prompt fed in ``pieces``."""
    past, logits, first = None, list[torch.Tensor](), 0
    with torch.inference_mode():
        for length in pieces:
            out = model(tokens[:, first : first + length], past_key_values=past, use_cache=True)
            past, first = out.past_key_values, first + length
            logits.append(out.logits[0])
    return torch.cat(logits)


@st.composite
def cuts(draw: st.DrawFn) -> list[int]:
    """Lengths that add up to LENGTH, many of them 1."""
    pieces, left = [], LENGTH
    while left:
        pieces.append(min(left, draw(st.one_of(st.just(1), st.integers(1, 9), st.integers(1, LENGTH)))))
        left -= pieces[-1]
    return pieces


@settings(max_examples=6, deadline=None)
@given(cuts())
def test_any_cut_gives_the_same_logits(model: Any, pieces: list[int]) -> None:
    tokens = tokens_of(LENGTH)
    assert_same(logits_in(model, tokens, pieces), logits_in(model, tokens, [LENGTH]))


def test_one_by_one_without_a_cache_and_on_other_threads(model: Any) -> None:
    tokens = tokens_of(40)
    want = logits_in(model, tokens, [40])
    assert_same(logits_in(model, tokens, [1] * 40), want)
    with torch.inference_mode():
        assert_same(model(tokens, use_cache=False).logits[0], want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads)
        assert_same(logits_in(model, tokens, [17, 1, 22]), want)
    finally:
        torch.set_num_threads(threads)


def test_every_instruction_set_gives_the_same_logits(model: Any) -> None:
    tokens, logits = tokens_of(30), list[torch.Tensor]()
    try:
        for name in native.instruction_sets():
            native.choose(name)
            logits.append(logits_in(model, tokens, [20, 1, 9]))
    finally:
        native.choose(native.instruction_sets()[0])
    for other in logits[1:]:
        assert_same(other, logits[0])
