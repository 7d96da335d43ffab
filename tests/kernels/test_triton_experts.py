"""Decode and prefill kernels against the plain twin: at most twice its error against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.device import random_model, reference, route

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("precision", "dtype", "hidden", "width", "top_k"),
    [
        ("int4", torch.float32, 128, 64, 2),
        ("int4", torch.bfloat16, 192, 96, 3),  # padded last groups, choices that are no power of two
        ("int8", torch.float32, 128, 64, 2),
        ("int8", torch.bfloat16, 192, 96, 3),
        ("lossless", torch.bfloat16, 80, 48, 2),
        ("lossless", torch.float32, 64, 40, 1),
    ],
)
@pytest.mark.parametrize("tokens", [1, 20])
def test_error_within_twice_the_twins(precision: str, dtype: torch.dtype, hidden: int, width: int, top_k: int, tokens: int) -> None:
    model = random_model(precision, dtype, hidden=hidden, width=width, top_k=top_k)
    experts = model.experts(4)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    index, weights = route(model, 0, x)
    exact = reference(model, 0, x, index, weights, torch.float64)
    twin = reference(model, 0, x, index, weights, dtype)
    out = experts.compute(0, x, index, weights)
    assert out.dtype == dtype
    allowed = 2 * (twin.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("tokens", [1, 17])
def test_short_views(planes: int, tokens: int) -> None:
    model = random_model(width=32)
    experts = model.experts(4)
    experts.state.layouts = [replace(layout, planes=planes) for layout in experts.state.layouts]
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(planes))
    index, weights = route(model, 0, x)
    exact = reference(model, 0, x, index, weights, torch.float64, planes)
    twin = reference(model, 0, x, index, weights, torch.float32, planes)
    allowed = 2 * (twin.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (experts.compute(0, x, index, weights).double() - exact).abs().max() <= allowed


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
