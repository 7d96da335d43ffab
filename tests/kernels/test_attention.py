"""Attention over a KV cache: every instruction set gives the twin's bits, for any number of rows and any cut of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from fate_moe.kernels.attention import POSITIONS, attend, dequantized, quantized, row_width, soften
from fate_moe.kernels.native import native
from tests.kernels.test_cpu import SETS
from tests.support.bits import assert_same

with_native = pytest.mark.skipif(native is None, reason="the extension is not built")


def an_example(past: int, tokens: int, heads: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [tokens, heads, dim], and keys and values [past + tokens, 1, dim] in memory that ends with them."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(past + tokens, 1, dim, generator=generator).bfloat16() for _ in range(2))
    return torch.randn(tokens, heads, dim, generator=generator), keys, values


def of_native(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, **options: Any) -> torch.Tensor:
    tokens, heads, dim = queries.shape
    out, sinks = torch.empty_like(queries), options.get("sinks")
    native.attend(
        queries.data_ptr(), tokens, heads, dim, keys.data_ptr(), values.data_ptr(), len(keys), scaling, options.get("window") or 0,
        options.get("cap") or 0.0, 0 if sinks is None else sinks.data_ptr(), out.data_ptr(), int(keys.dtype == torch.uint8),
    )  # fmt: skip
    return out


@with_native
@settings(max_examples=40, deadline=None)
@given(
    past=st.sampled_from([0, 1, 5, 62, 63, 64, 127, 200]),
    tokens=st.sampled_from([1, 2, 3, 7, 70]),
    heads=st.integers(1, 9),
    dim=st.sampled_from([2, 8, 16, 24, 32, 40, 64, 80, 128]),
    options=st.fixed_dictionaries(
        {"window": st.sampled_from([None, None, 1, 3, 64, 100]), "cap": st.sampled_from([None, None, 2.0]), "sink": st.booleans()}
    ),
    int8=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attend_is_the_twin(past: int, tokens: int, heads: int, dim: int, options: dict[str, Any], int8: bool, seed: int) -> None:
    if tokens * dim * heads > 5_000:
        heads, dim = min(heads, 3), min(dim, 24)
    queries, keys, values = an_example(past, tokens, heads, dim, seed)
    if int8:
        keys, values = quantized(keys), quantized(values)
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(seed)) if options["sink"] else None
    chosen: dict[str, Any] = {"scaling": 0.7, "window": options["window"], "cap": options["cap"], "sinks": sinks}
    want = attend(queries, keys, values, **chosen)
    try:
        for name in SETS:
            native.choose(name)
            assert_same(of_native(queries, keys, values, **chosen), want, name)
            alone = of_native(queries[-1:].contiguous(), keys, values, **chosen)
            assert_same(alone, want[-1:], f"{name}, the last row alone")
    finally:
        native.choose(SETS[0])


@with_native
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_a_row_does_not_see_what_comes_after_it(value: float) -> None:
    """Not even numbers that times zero are no number; nor what was never written."""
    queries, keys, values = an_example(60, 9, 2, 16)
    want = attend(queries, keys, values, scaling=0.3)[:5]
    keys[66], values[65:] = value, value
    coded = quantized(keys), quantized(values)
    want_coded = attend(queries[:5], coded[0][:65], coded[1][:65], scaling=0.3)
    try:
        for name in SETS:
            native.choose(name)
            assert_same(of_native(queries, keys, values, 0.3)[:5], want, name)
            assert_same(of_native(queries, *coded, 0.3)[:5], want_coded, name)
    finally:
        native.choose(SETS[0])


@with_native
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 24, 63, 64, 65, 100, 128, 576]),
    st.sampled_from([1e-38, 1e-3, 1.0, 3e38]),
    st.booleans(),
    st.integers(0, 99),
)
def test_rows_of_an_int8_cache_are_the_twins(n: int, size: float, spoiled: bool, seed: int) -> None:
    x = size * torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    if spoiled:
        x[1, -1], x[2, 0] = torch.nan, torch.inf
    want = quantized(x)
    assert want.shape == (3, row_width("int8", n))
    try:
        for name in SETS:
            native.choose(name)
            got = torch.empty_like(want)
            native.put_codes(x.data_ptr(), 3, n, got.data_ptr())
            assert_same(got[:, :n], want[:, :n], name)
            assert_same(*(rows[:, n:].contiguous().view(torch.float32) for rows in (got, want)), name)
    finally:
        native.choose(SETS[0])


def test_a_row_of_an_int8_cache_is_near_what_it_stands_for() -> None:
    """By half a step of each group, and the roundings to bf16."""
    x = torch.randn(40, 3, 100, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0]).repeat_interleave(64)[:100]
    got, largest = dequantized(quantized(x), 100).float(), torch.stack([part.abs().amax(-1) for part in x.split(64, -1)], -1)
    step = (largest / 127).repeat_interleave(64, -1)[..., :100]
    assert bool(((got - x).abs() <= 0.5 * step + x.abs() / 64).all())
    queries, keys, values = an_example(70, 5, 2, 100)
    exact = attend(queries, keys, values, scaling=0.1)
    assert 0 < (attend(queries, quantized(keys), quantized(values), scaling=0.1) - exact).abs().max() < 0.02


def test_the_twin_is_attention() -> None:
    """Against float64, with grouped heads, a window, sinks and a cap."""
    generator = torch.Generator().manual_seed(0)
    queries, past = torch.randn(5, 4, 16, generator=generator), 2 * POSITIONS + 3
    keys, values = (torch.randn(past + 5, 2, 16, generator=generator).bfloat16() for _ in range(2))
    q, k, v = (x.double().transpose(0, 1) for x in (queries, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)))
    at, of = torch.arange(past + 5), torch.arange(past, past + 5).unsqueeze(1)
    got = attend(queries, keys, values, scaling=0.4)
    want = scaled_dot_product_attention(q, k, v, attn_mask=at <= of, scale=0.4).transpose(0, 1)
    assert 0 < (got - want).abs().max() < 1e-6
    got = attend(queries, keys, values, scaling=0.4, window=70)
    want = scaled_dot_product_attention(q, k, v, attn_mask=(at <= of) & (at > of - 70), scale=0.4).transpose(0, 1)
    assert 0 < (got - want).abs().max() < 1e-6
    sinks, cap = torch.randn(4, generator=generator), 1.5
    scores = (cap * (0.4 * (q @ k.mT) / cap).tanh()).masked_fill(at > of, -torch.inf)
    weights = torch.cat([scores, sinks.double().view(4, 1, 1).expand(4, 5, 1)], 2).softmax(-1)[:, :, :-1]
    got = attend(queries, keys, values, scaling=0.4, sinks=sinks, cap=cap)
    assert 0 < (got - (weights @ v).transpose(0, 1)).abs().max() < 1e-6
    x = torch.linspace(-50, 50, 1001)
    assert 0 < (soften(x, 2.0) - 2 * (x.double() / 2).tanh()).abs().max() < 1e-6


def test_the_twin_gives_a_row_the_same_bits_in_any_company() -> None:
    queries, keys, values = an_example(70, 12, 2, 8)
    whole = attend(queries, keys, values, scaling=0.5)
    parts = [attend(queries[i : i + 4], keys[: 74 + i], values[: 74 + i], scaling=0.5) for i in (0, 4, 8)]
    assert_same(torch.cat(parts), whole)
