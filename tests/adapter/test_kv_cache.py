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

from fate_moe.adapter.kv_cache import Int8Layer, RoomyLayer, RoomySlidingLayer, make_room, room_for
from fate_moe.engine import attach
from fate_moe.kernels.attention import dequantized, quantized

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
    st.sampled_from([(4, 4), (4, 2)]),
    st.booleans(),
)
def test_it_holds_what_transformers_own_holds(steps: list[Any], window: int | None, dims: tuple[int, int], int8: bool) -> None:
    """In int8: what that keeps of it."""
    generator = torch.Generator().manual_seed(0)
    plain, cache = DynamicLayer(), DynamicCache()
    if window:
        plain = DynamicSlidingWindowLayer(window)
        cache.layers = [DynamicSlidingWindowLayer(window)]
    else:
        cache.layers = [DynamicLayer()]
    make_room(cache, 200, kv_format="int8" if int8 else "bf16")
    roomy: Any = cache.layers[0]
    assert (isinstance(roomy, Int8Layer), isinstance(roomy, RoomySlidingLayer)) == (int8, window is not None)
    if window:
        # transformers' own has to be told before a crop, and 5.17 keeps zeros at a reset.
        steps = [step for step in steps if step not in ("crop", "reset")]
    for step in steps:
        if isinstance(step, int):
            states = [torch.randn(2, 3, step, dim, generator=generator) for dim in dims]
            kept = _as_int8(*states) if int8 else states
            for got, want in zip(roomy.update(*states), plain.update(*kept), strict=True):
                assert torch.equal(got, want)
        elif step == "copy":
            roomy = copy.deepcopy(roomy)
        else:
            STEPS[step](plain)
            STEPS[step](roomy)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(2) == plain.get_mask_sizes(2)


def _as_int8(keys: torch.Tensor, values: torch.Tensor) -> Any:
    """What rows in int8 stand for; latent rows and what turns are one."""
    dims = keys.shape[-1], values.shape[-1]
    if dims[0] == dims[1]:
        return [dequantized(quantized(states), dims[0]).float() for states in (keys, values)]
    return dequantized(quantized(torch.cat([keys, values], -1)), sum(dims)).float().split(dims, -1)


def test_what_the_extension_writes_in_int8_is_read_in_bf16() -> None:
    cache, states = DynamicCache(), torch.randn(2, 1, 3, 70, 8, generator=torch.Generator().manual_seed(0))
    layer = room_for(cache, 0, 3, (8, 8), 1, "int8")
    assert layer is not None
    for first, count in ((0, 1), (1, 69)):
        past, *buffers = layer.reserve(count)
        assert past == first
        for buffer, rows in zip(buffers, quantized(states[..., first : first + count, :]), strict=True):
            buffer[:, :, past : past + count] = rows
        layer.extend(count)
    assert layer.keys is not None
    assert torch.equal(torch.stack([layer.keys.float(), layer.values.float()]), torch.stack(_as_int8(*states)))  # type: ignore[union-attr]


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
    monkeypatch.setattr(attach, "make_room", lambda cache, most, **_: None)
    assert torch.equal(got, model.generate(tokens, **options))
