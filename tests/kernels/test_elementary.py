"""What is computed between products: every instruction set gives the twin's bits, and the twin is near fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.kernels import elementary
from fate_moe.kernels.native import BF16, DTYPES, F32, native
from tests.kernels.test_cpu import SETS
from tests.support.bits import assert_same, numbers

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
GRID = torch.linspace(-90, 90, 200_001)
with_native = pytest.mark.skipif(native is None, reason="the extension is not built")


def of_each_set(run: Callable[[], torch.Tensor], want: torch.Tensor) -> None:
    """``run`` gives ``want`` in every instruction set."""
    try:
        for name in SETS:
            native.choose(name)
            assert_same(run(), want, name)
    finally:
        native.choose(SETS[0])


@with_native
@given(numbers(lengths=st.integers(1, 70)), st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(), st.data())
def test_activations(x: torch.Tensor, activation: str, has_gate: bool, mixed: bool, data: st.DataObject) -> None:
    alpha, limit = data.draw(st.sampled_from([1.0, 1.702])), data.draw(st.sampled_from([math.inf, 7.0]))
    offset = data.draw(st.sampled_from([0.0, 1.0]))
    x = x[: len(x) // 2 * 2] if has_gate else x
    count = len(x) // 2 if has_gate else len(x)
    spec = native.ActivationSpec.make(ACTIVATIONS.index(activation), has_gate, mixed, alpha, limit, offset)

    def run() -> torch.Tensor:
        out = torch.empty(count)
        native.activate(spec, x.data_ptr(), count, out.data_ptr())
        return out

    gate, up = (x[::2], x[1::2]) if mixed else (x[:count], x[count:])
    want = elementary.gated(gate, up, activation, alpha, limit, offset) if has_gate else elementary.activate(x, activation, alpha)
    of_each_set(run, want)


@with_native
def test_activations_all_over_their_range() -> None:
    for number, activation in enumerate(ACTIVATIONS):
        spec = native.ActivationSpec.make(number, False, False, 1.0, math.inf, 0.0)

        def run(spec: object = spec) -> torch.Tensor:
            out = torch.empty_like(GRID)
            native.activate(spec, GRID.data_ptr(), len(GRID), out.data_ptr())
            return out

        of_each_set(run, elementary.activate(GRID, activation))


@with_native
@given(numbers(lengths=st.integers(1, 70)))
def test_sigmoid(x: torch.Tensor) -> None:
    def run() -> torch.Tensor:
        out = x.clone()
        native.sigmoid(out.data_ptr(), len(out))
        return out

    of_each_set(run, elementary.sigmoid(x))


@with_native
@given(
    numbers(lengths=st.integers(1, 70), rows=3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
)
def test_norm(pair: torch.Tensor, dtype: torch.dtype, rounds_first: bool, centered: bool, offset: float) -> None:
    x, weight, bias = pair[0].to(dtype), pair[1], pair[2]
    of = native.Norm.make(weight.data_ptr(), bias.data_ptr() if centered else 0, 0, 1e-6, offset, rounds_first, centered)

    def run() -> torch.Tensor:
        out = torch.empty_like(x)
        native.norm(of, x.data_ptr(), DTYPES[dtype], 1, len(x), out.data_ptr(), 1)
        return out.float()

    centred = elementary.center(x.float()) if centered else x.float()
    want = elementary.normalize(centred, offset + weight if offset else weight, 1e-6, rounds_first and dtype == torch.bfloat16)
    want = want + bias if centered else want
    of_each_set(run, want.to(dtype).float())


@with_native
@given(numbers(lengths=st.integers(1, 150), rows=5), numbers(lengths=st.just(5)))
def test_combine(rows: torch.Tensor, weights: torch.Tensor) -> None:
    def run() -> torch.Tensor:
        out = torch.empty(rows.shape[1])
        native.combine(rows.data_ptr(), weights.data_ptr(), 0, 1, 5, rows.shape[1], out.data_ptr(), 0, 1)
        return out

    of_each_set(run, elementary.combine(rows.unsqueeze(0), weights.unsqueeze(0))[0])


@with_native
@given(
    numbers(lengths=st.integers(1, 90), rows=9),
    st.integers(1, 21),
    st.integers(1, 9),
    st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_product_of_numbers(x: torch.Tensor, rows: int, tokens: int, bias_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    generator, x = torch.Generator().manual_seed(rows), x[:tokens]
    weight = torch.randn(rows, x.shape[1], generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(bias_dtype) if bias_dtype is not None else None
    at = (weight.nbytes + 3) // 4 * 4 if bias is not None else -1  # a number of fp32 begins at a multiple of 4 bytes
    both = torch.zeros(at + 4 * rows if bias is not None else weight.nbytes, dtype=torch.uint8)
    both[: weight.nbytes] = weight.view(torch.uint8).flatten()
    if bias is not None:
        both[at : at + bias.nbytes] = bias.view(torch.uint8)
    kind = BF16 if dtype == torch.bfloat16 else F32
    place = native.Place.make(kind, rows, x.shape[1], [0], 0, 0, at, DTYPES[bias_dtype or torch.float32])

    def run() -> torch.Tensor:
        out = torch.empty(tokens, rows)
        native.linear(place, both.data_ptr(), kind, x.data_ptr(), 0, tokens, out.data_ptr(), 0, False, 1)
        return out

    of_each_set(run, elementary.linear_bf16(x, weight, bias))


@with_native
@given(numbers(lengths=st.integers(1, 40).map(lambda half: 2 * half), rows=3), st.integers(0, 3))
def test_turn(rows: torch.Tensor, others: int) -> None:
    """Halves and pairs."""
    angles = rows[1:].clone()
    head = torch.cat([rows[0], torch.ones(others)])

    def run() -> torch.Tensor:
        out = head.clone()
        native.turn(out.data_ptr(), angles.shape[1], angles[0].data_ptr(), angles[1].data_ptr())
        return out

    of_each_set(run, elementary.turn(head.view(1, 1, -1), angles[:1], angles[1:])[0, 0])
    for parts in (False, True):

        def run_pairs(parts: bool = parts) -> torch.Tensor:
            out = head.clone()
            native.turn_pairs(out.data_ptr(), angles.shape[1], angles[0].data_ptr(), angles[1].data_ptr(), parts)
            return out

        of_each_set(run_pairs, elementary.turn_pairs(head.view(1, 1, -1), angles[:1], angles[1:], parts)[0, 0])


@given(numbers(lengths=st.integers(1, 200), size=3.0), numbers(lengths=st.just(1), size=3.0), st.booleans())
def test_fused_rounds_the_exact_value(a: torch.Tensor, b: torch.Tensor, cancels: bool) -> None:
    """Where the sum is exact in fp64, it is that, rounded once."""
    c = -(a * b) if cancels else torch.ones_like(a)
    exact = a.double() * b.double() + c.double()
    known = (exact - c.double() == a.double() * b.double()) & exact.isfinite()
    assert torch.equal(elementary.fused(a, b, c)[known], exact.float()[known])


def test_the_twin_is_near_fp64() -> None:
    inner = GRID[GRID.abs() < 86]
    wide = inner.double()
    error = (elementary.exponential(inner).double() / wide.exp() - 1).abs()
    assert 1e-8 < error.max() < 3e-7
    tanh_gelu = torch.nn.functional.gelu(wide, approximate="tanh")
    for activation, exact, within in (
        ("silu", torch.nn.functional.silu(wide), 3e-7),
        ("gelu", torch.nn.functional.gelu(wide), 4e-7),
        ("gelu_pytorch_tanh", tanh_gelu, 4e-7),
    ):
        error = (elementary.activate(inner, activation).double() - exact).abs()
        assert 0 < (error / wide.abs().clamp(min=1e-30)).max() < within, activation
    above = (inner > -13) & (inner != 0)
    exact = wide * torch.special.erfc(-wide / math.sqrt(2)) / 2
    error = (elementary.gelu(inner).double()[above] / exact[above] - 1).abs()
    assert 0 < error.max() < 2e-5


def test_steps_of_rows_are_near_fp64() -> None:
    x = 3 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    wide = x.double()
    norm = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert 0 < ((elementary.normalize(x, torch.ones(1000), 1e-6) - norm).abs() / norm.abs()).max() < 4e-7
    assert 0 < ((elementary.softmax(x) - wide.softmax(-1)) / wide.softmax(-1)).abs().max() < 2e-6
    centred = wide - wide.mean(-1, keepdim=True)
    assert 0 < (elementary.center(x) - centred).abs().max() < 2e-6
