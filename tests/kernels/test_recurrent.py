"""The gated delta rule: the twin's bits from every instruction set, in any cut and beside other sequences."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fate_moe.kernels.elementary import exponential, linear_bf16
from fate_moe.kernels.native import BF16, native
from fate_moe.kernels.plain_layer import Delta, Norm
from fate_moe.kernels.recurrent import delta_attention, empty_state, log_one_plus, softplus
from tests.support.bits import assert_same

needs_native = pytest.mark.skipif(native is None, reason="the extension is not built")
HIDDEN = 70


@pytest.fixture(params=native.instruction_sets() if native is not None else [])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    native.choose(request.param)
    yield request.param
    native.choose(native.instruction_sets()[0])


def test_logarithms_are_right() -> None:
    z = torch.linspace(-80, 20, 4001).exp()
    assert ((log_one_plus(z).double() - z.double().log1p()) / z.double().log1p()).abs().max() < 3e-7
    x = torch.linspace(-86, 90, 4001)
    want = torch.nn.functional.softplus(x.double(), threshold=80)
    assert ((softplus(x).double() - want) / want).abs().max() < 1e-6


def weights(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, cols, generator=generator) / math.sqrt(cols)).bfloat16()


@functools.cache
def layer_and_twin(by_head: bool) -> tuple[OwnDelta, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    layer = OwnDelta(by_head)
    return layer, layer.twin(20)


class OwnDelta:
    """A layer with bf16 matrices, as Qwen3-Next (``by_head``) or Qwen3.5 has it, and its twin."""

    def __init__(self, by_head: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        delta = Delta(2, 4, 24, 80, 4, Norm(1e-6), ("", "") if by_head else ("", "", "", ""), by_head)
        keys, values = 2 * delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
        rows = [keys + 2 * values, 8] if by_head else [keys + values, values, 4, 4]
        self.delta, self.inputs = delta, [weights(count, HIDDEN, generator) for count in rows]
        self.out, self.convolution = (
            weights(HIDDEN, values, generator),
            torch.randn(delta.channels, 4, generator=generator).bfloat16(),
        )
        self.bias, self.rates = torch.randn(4, generator=generator), torch.rand(4, generator=generator).bfloat16()
        self.norm = torch.rand(delta.value_dim, generator=generator).bfloat16() + 0.5
        self.x = torch.randn(300, HIDDEN, generator=generator)
        made = native.Delta.make(
            list(map(self.weight, self.inputs)), 2, 4, delta.key_dim, delta.value_dim, 4, *delta.places,
            self.convolution.float().T.flatten().tolist(), self.bias.tolist(), exponential(self.rates.float()).tolist(),
            native.Norm.make(self.norm.data_ptr(), 0, 1, 1e-6, 0.0, True, False),
        )  # fmt: skip
        none = native.Weight.make(native.Place.make(BF16, 0, 64, [0], 0, 0, -1, 0), 0, 0, 0)
        nothing = native.Norm.make(0, 0, 0, 0.0, 0.0, False, False)
        self.of = native.Attention.make(
            none, none, none, self.weight(self.out), 4, 2, delta.value_dim, 0, 0, 0, 1.0, nothing, nothing, False, 0.0, 0, 0, 0,
            None, delta=made,
        )  # fmt: skip

    @staticmethod
    def weight(numbers: torch.Tensor) -> Any:
        return native.Weight.make(native.Place.make(BF16, *numbers.shape, [0], 0, 0, -1, 0), numbers.data_ptr(), 0, 0)

    def twin(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raw = torch.cat([linear_bf16(self.x[:count], matrix) for matrix in self.inputs], 1)
        made, state = delta_attention(self.delta, raw, self.convolution, self.bias, self.rates, self.norm, empty_state(self.delta))
        return linear_bf16(made, self.out), state[0].T, state[1]

    def run(
        self, passes: list[dict[int, tuple[int, int]]], marks: dict[int, list[tuple[int, int]]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of three entries, which see the same tokens: results [3, 300, HIDDEN] and what they keep, after ``passes`` with rows
        (first, end) of some entries each. ``marks`` by entry: (position, entry)."""
        delta, out = self.delta, torch.full((3, 300, HIDDEN), math.nan)
        inputs = torch.full((3, delta.channels, delta.kernel), math.nan, dtype=torch.bfloat16)
        states = torch.full((3, delta.value_heads, delta.key_dim, delta.value_dim), math.nan)
        kv = native.Kv.make(inputs.data_ptr(), states.data_ptr(), inputs[0].numel(), states[0].numel(), 0)
        for rows in passes:
            x = torch.cat([self.x[first:end] for first, end in rows.values()])
            counts, firsts = [end - first for first, end in rows.values()], [first for first, _ in rows.values()]
            places = [marks.get(entry, []) for entry in rows] if marks else []
            got, spans = torch.empty_like(x), native.Spans.make(counts, firsts, list(rows), [0] * len(rows), [], places)
            native.attention(self.of, x.data_ptr(), 0, spans, 0, 0, kv, got.data_ptr(), True, 2)
            for (entry, (first, end)), part in zip(rows.items(), torch.split(got, counts), strict=True):
                out[entry, first:end] = part
        return out, inputs, states


@needs_native
@pytest.mark.parametrize("by_head", [True, False])
def test_the_rule_gives_the_twins_bits_in_any_cut(instructions: str, by_head: bool) -> None:
    layer, want = layer_and_twin(by_head)
    cuts: list[list[dict[int, tuple[int, int]]]] = [
        [{1: (0, 20)}],
        [{1: (0, 1)}, {1: (1, 2)}, {1: (2, 9)}, {1: (9, 20)}],
        [{0: (0, 5), 1: (0, 3)}, {1: (3, 16), 2: (0, 7)}, {0: (5, 6), 2: (7, 8), 1: (16, 20)}],
    ]
    for passes in cuts:
        for got, expected in zip(layer.run(passes), want, strict=True):
            assert_same(got[1, :20] if got.shape[1:] == (300, HIDDEN) else got[1], expected)


@needs_native
def test_more_rows_than_go_through_at_once() -> None:
    layer = OwnDelta(True)
    whole, parts = layer.run([{0: (0, 300)}]), layer.run([{0: (0, 120)}, {0: (120, 300)}])
    for one, other in zip(whole, parts, strict=True):
        assert_same(one[0], other[0])


@needs_native
@pytest.mark.parametrize("passes", [[{0: (0, 300)}], [{0: (0, 7)}, {0: (7, 260)}, {0: (260, 300)}]], ids=["whole", "parts"])
def test_a_mark_has_the_state_of_its_position(instructions: str, passes: list[dict[int, tuple[int, int]]]) -> None:
    """Within a pass, at its end, and beyond the rows that go through at once; the rows behind it are what they are without."""
    layer = OwnDelta(True)
    plain = layer.run(passes)
    for position in (1, 7, 260, 299, 300):
        out, inputs, states = layer.run(passes, {0: [(position, 2)]})
        _, want_inputs, want_states = layer.run([{1: (0, position)}])
        assert_same(out[0], plain[0][0])
        assert_same(inputs[2], want_inputs[1])
        assert_same(states[2], want_states[1])
        assert_same(states[0], plain[2][0])
