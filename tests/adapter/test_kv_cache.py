"""A KV cache with room does what transformers' own does, whatever is done to it in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fate_moe.adapter.kv_cache import RoomyLayer, RoomySlidingLayer, make_room
from fate_moe.engine import attach

STEPS: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-min(3, layer.get_seq_length())),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat and select": lambda layer: (layer.batch_repeat_interleave(2), layer.batch_select_indices(torch.tensor([3, 1]))),
    "reset": lambda layer: layer.reset(),
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 90), st.sampled_from(sorted(STEPS)), st.just("copy")), max_size=12),
    st.sampled_from([None, None, 2, 16]),
)
def test_it_holds_what_transformers_own_holds(steps: list[Any], window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, roomy = DynamicLayer(), RoomyLayer(200)
    if window:
        plain, roomy = DynamicSlidingWindowLayer(window), RoomySlidingLayer(200, window)
        steps = [step for step in steps if step != "crop"]  # transformers' own has to be told before
    for step in steps:
        if isinstance(step, int):
            states = [torch.randn(2, 3, step, 4, generator=generator) for _ in range(2)]
            for got, want in zip(roomy.update(*states), plain.update(*states), strict=True):
                assert torch.equal(got, want)
        elif step == "copy":
            roomy = copy.deepcopy(roomy)
        else:
            STEPS[step](plain)
            STEPS[step](roomy)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(2) == plain.get_mask_sizes(2)


def test_room_is_not_taken_beyond_what_was_set_aside() -> None:
    layer = RoomyLayer(100)
    one = torch.zeros(2, 1, 1, 4)
    for _ in range(50):
        layer.update(one, one)
    assert layer.keys is not None
    assert layer.keys.untyped_storage().nbytes() == 2 * 50 * 4 * 4
    layer.update(one, one)  # it is not for the cache to refuse
    assert layer.get_seq_length() == 51


def test_a_step_writes_behind_what_is_there() -> None:
    layer = RoomyLayer(100)
    one = torch.ones(1, 1, 1, 4)
    layer.update(one, one)
    before = layer.keys
    layer.update(2 * one, 2 * one)
    assert before is not None
    assert layer.keys is not None
    assert layer.keys.data_ptr() == before.data_ptr()


def test_only_plain_layers_of_plain_caches_get_room(loaded: Callable[..., Any]) -> None:
    model = loaded("gpt_oss")  # layers with a window and without
    cache = DynamicCache(config=model.config)
    make_room(cache, 64)
    assert {type(layer).__name__ for layer in cache.layers} == {"RoomySlidingLayer", "RoomyLayer"}
    assert all((type(layer) is RoomyLayer) != layer.is_sliding for layer in cache.layers)
    forgetful = DynamicCache(config=model.config)
    states = torch.randn(2, 1, 2, 40, 16)
    for layer in forgetful.layers:
        layer.update(*states)
    make_room(forgetful, 64)
    assert {type(layer).__name__ for layer in forgetful.layers} == {"DynamicSlidingWindowLayer", "RoomyLayer"}


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}]
)
def test_generate_as_without_it(loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Beams reorder the cache, assisted decoding crops it."""
    model = loaded("qwen2_moe")
    tokens = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])
    options |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    got = model.generate(tokens, **options)
    monkeypatch.setattr(attach, "make_room", lambda cache, most: None)
    assert torch.equal(got, model.generate(tokens, **options))
