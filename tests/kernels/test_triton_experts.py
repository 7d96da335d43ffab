"""Decode and prompt kernels: of quantized experts the twin's bits, of unquantized ones at most twice its error against float64."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fate_moe.kernels.reference import quantize_activations
from fate_moe.kernels.triton_quantize import quantize_rows_kernel
from tests.support.device import Model, random_model, reference, route, twin

pytestmark = pytest.mark.slow


@settings(max_examples=12, deadline=None)
@given(
    precision=st.sampled_from(["int4", "int8"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    hidden=st.sampled_from([64, 128, 192, 336]),
    width=st.sampled_from([32, 64, 96, 144]),
    top_k=st.integers(1, 4),
    tokens=st.sampled_from([1, 2, 17, 40]),
    magnitude=st.sampled_from([1e-38, 1e-3, 1.0, 300.0, 65504.0]),
)
def test_quantized_experts_give_the_twins_bits(
    precision: str, dtype: torch.dtype, hidden: int, width: int, top_k: int, tokens: int, magnitude: float
) -> None:
    model = random_model(precision, dtype, hidden=hidden, width=width, top_k=top_k)
    x = _tokens(model, tokens) * magnitude
    x[0, :64] = 0
    index, weights = route(model, 0, x)
    assert torch.equal(model.experts(4).compute(0, x, index, weights), twin(model, 0, x, index, weights))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("tokens", [1, 17])
def test_short_views_give_the_twins_bits(planes: int, tokens: int) -> None:
    model = random_model(width=32)
    experts = model.experts(4)
    experts.state.layouts = [replace(layout, planes=planes) for layout in experts.state.layouts]
    x = _tokens(model, tokens)
    index, weights = route(model, 0, x)
    assert torch.equal(experts.compute(0, x, index, weights), twin(model, 0, x, index, weights, planes))


@pytest.mark.parametrize("tokens", [1, 17])
def test_gelu_gives_the_twins_bits(tokens: int) -> None:
    model = random_model(width=64)
    experts = model.experts(4)
    experts.state.layouts = [replace(layout, activation="gelu") for layout in experts.state.layouts]
    x = _tokens(model, tokens)
    index, weights = route(model, 0, x)
    assert torch.equal(experts.compute(0, x, index, weights), twin(model, 0, x, index, weights, activation="gelu"))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    model = random_model(width=32, experts=8)
    experts = model.experts(8)
    x = _tokens(model, 2)
    index, weights = route(model, 0, x)
    x[0, 3] = value
    out = experts.compute(0, x, index, weights)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], twin(model, 0, x[1:], index[1:], weights[1:]))


@pytest.mark.parametrize("planes", [3, 8])
def test_a_prompts_activations_are_the_twins(planes: int) -> None:
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    pairs = [32 * half + 8 * k + 2 * j + odd for j in range(4) for half in range(2) for odd in range(2) for k in range(4)]
    order = list(range(64)) + (pairs if planes == 3 else [])
    codes, scales, sums = torch.zeros(3, 2, len(order), dtype=torch.int8), torch.zeros(3, 2), torch.zeros(3, 2)
    quantize_rows_kernel[(3, 1)](x, codes, scales, sums, cols=100, groups=2, PLANES=planes, BG=2)
    made, scale = quantize_activations(x, 64)
    assert torch.equal(codes.float(), made[:, :, order])
    assert torch.equal(scales, scale)
    assert torch.equal(sums, made.sum(2))


@pytest.mark.parametrize(
    ("dtype", "hidden", "width", "top_k"), [(torch.bfloat16, 80, 48, 2), (torch.float32, 64, 40, 1), (torch.float32, 128, 64, 3)]
)
@pytest.mark.parametrize("tokens", [1, 20])
def test_error_of_unquantized_experts_within_twice_the_twins(
    dtype: torch.dtype, hidden: int, width: int, top_k: int, tokens: int
) -> None:
    model = random_model("lossless", dtype, hidden=hidden, width=width, top_k=top_k)
    experts = model.experts(4)
    x = _tokens(model, tokens)
    index, weights = route(model, 0, x)
    exact = reference(model, 0, x, index, weights, torch.float64)
    rounded = reference(model, 0, x, index, weights, dtype)
    out = experts.compute(0, x, index, weights)
    assert out.dtype == dtype
    allowed = 2 * (rounded.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed


def test_a_row_without_an_expert_adds_nothing() -> None:
    model = random_model(width=32)
    experts = model.experts(4)
    x = torch.randn(2, 128)
    index, weights = route(model, 0, x)
    masked = index.clone()
    masked[0, 1] = -1
    masked[1, 0] = model.num_experts
    kept = weights.clone()
    kept[0, 1] = kept[1, 0] = 0
    torch.testing.assert_close(experts.compute(0, x, masked, weights), experts.compute(0, x, index, kept), rtol=0, atol=0)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    model = random_model(experts=8, top_k=2)
    experts = model.experts(8)
    x = torch.randn(4, 128)
    index, weights = route(model, 0, x)
    together = experts.compute(0, x, index, weights)
    for row in range(4):
        alone = experts.compute(0, x[row : row + 1], index[row : row + 1], weights[row : row + 1])
        assert torch.equal(alone[0], together[row])


def _tokens(model: Model, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, model.hidden, generator=torch.Generator().manual_seed(tokens)).to(model.dtype)
