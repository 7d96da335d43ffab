"""Norm, MLP, attention and a whole layer's head in one call each, against torch in float64, for every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from fate_moe.kernels.attention import attend
from fate_moe.kernels.elementary import combine, fused, normalize, sigmoid, turn, turn_pairs
from fate_moe.kernels.native import BF16, ROPES, matrix_place, native
from tests.kernels.test_cpu import SETS, a_blob
from tests.support.bits import assert_same

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    native.choose(request.param)
    yield request.param
    native.choose(SETS[0])


def matrix(rows: int, cols: int, generator: torch.Generator) -> tuple[torch.Tensor, Any]:
    """bf16 numbers and the extension's Weight of them."""
    numbers = (torch.randn(rows, cols, generator=generator) / math.sqrt(cols)).bfloat16()
    place = native.Place.make(BF16, rows, cols, [0], 0, 0, -1, 0)
    return numbers, native.Weight.make(place, numbers.data_ptr(), 0, 0)


def assert_near(got: torch.Tensor, want: torch.Tensor, epsilon: float) -> None:
    """Within two roundings of the largest number (sums of products that nearly cancel included)."""
    assert (got.double() - want).abs().max() <= 2 * epsilon * want.abs().max()


@pytest.mark.parametrize(("hidden", "inner"), [(64, 32), (70, 100), (128, 2500)])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_mlp(instructions: str, hidden: int, inner: int, num_tokens: int) -> None:
    """2,500 inner values are three chunks, the last of an odd length."""
    generator = torch.Generator().manual_seed(inner)
    (gate, gate_at), (up, up_at), (down, down_at) = (
        matrix(rows, cols, generator) for rows, cols in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    of = native.Mlp.make(gate_at, up_at, down_at, native.ActivationSpec.make(0, True, False, 1.0, math.inf, 0.0))
    x = torch.randn(num_tokens, hidden, generator=generator)
    out = torch.empty_like(x)
    native.mlp(of, x.data_ptr(), 0, num_tokens, out.data_ptr(), True, 2)
    exact = x.double()
    inner_values = silu(exact @ gate.double().T) * (exact @ up.double().T)
    assert_near(out, inner_values @ down.double().T, 1e-5)


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_mlp_of_quantized_matrices(instructions: str, bits: str) -> None:
    """The same as three products of their own: activations are rounded in the same groups wherever chunks begin."""
    hidden, inner, generator = 130, 1500, torch.Generator().manual_seed(0)
    blobs = [a_blob(bits, *shape, seed) for seed, shape in enumerate([(inner, hidden), (inner, hidden), (hidden, inner)])]
    places = [
        matrix_place(layout, "W", shape)
        for (layout, _, _), shape in zip(blobs, [(inner, hidden), (inner, hidden), (hidden, inner)], strict=True)
    ]
    weights = [native.Weight.make(place, blob.data_ptr(), 0, 0) for place, (_, blob, _) in zip(places, blobs, strict=True)]
    x = torch.randn(2, hidden, generator=generator)

    def product(which: int, x: torch.Tensor, rows: int) -> torch.Tensor:
        out = torch.empty(len(x), rows)
        native.linear(places[which], blobs[which][1].data_ptr(), 3, x.data_ptr(), 0, len(x), out.data_ptr(), 0, False, 1)
        return out

    how = native.ActivationSpec.make(0, True, False, 1.0, math.inf, 0.0)
    values = torch.empty(2, inner)
    gate_up = torch.cat([product(0, x, inner), product(1, x, inner)], dim=1)
    for row in range(2):
        native.activate(how, gate_up[row].data_ptr(), inner, values[row].data_ptr())
    out = torch.empty(2, hidden)
    native.mlp(native.Mlp.make(*weights, how), x.data_ptr(), 0, 2, out.data_ptr(), False, 2)
    assert torch.equal(out, product(2, values, hidden))


class OwnAttention:
    """An attention with bf16 matrices, and the twins of its steps on what the extension's products give."""

    heads, kv_heads, dim, hidden = 4, 2, 24, 70

    def __init__(
        self,
        norms: str = "",
        turned: int = 24,
        clip: float = 0.0,
        window: int = 0,
        rope: str = "halves",
        half: bool = False,
        sinks: bool = False,
        after: bool = False,
        gated: bool = False,
        every: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [heads * self.dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        of_matrices = [sizes[0] * (2 if gated else 1), *sizes[1:]]
        self.made = [matrix(rows, self.hidden, generator) for rows in of_matrices] + [matrix(self.hidden, sizes[0], generator)]
        self.after, self.gated, self.every, self.scales = after, gated, every, torch.rand(5, generator=generator)
        self.norms, self.turned, self.clip, self.window = norms, turned, clip, window
        lengths = [self.dim] * 2 if norms == "head" else sizes[:2]
        self.norm_weights = [torch.rand(length, generator=generator).bfloat16() + 0.5 for length in lengths]
        addresses = [weight.data_ptr() if norms else 0 for weight in self.norm_weights]
        self.rope, self.sinks = rope, torch.randn(self.heads, generator=generator).bfloat16() if sinks else None
        self.of = native.Attention.make(
            *(at for _, at in self.made), self.heads, self.kv_heads, self.dim, turned, turned // 2 if half else turned,
            ROPES.index(rope), 0.3, *(native.Norm.make(at, 0, 1, 1e-6, 0.0, False, False) for at in addresses), norms == "all",
            clip, window, self.sinks.data_ptr() if self.sinks is not None else 0, 1, None, after, gated,
            self.scales.tolist() if every else [], max(1, every),
        )  # fmt: skip
        angles = torch.rand(200, turned // 2, generator=generator).repeat(1, 1 if half else 2) * 3
        self.cos, self.sin, self.x = angles.cos(), angles.sin(), torch.randn(200, self.hidden, generator=generator)

    def product(self, which: int, x: torch.Tensor) -> torch.Tensor:
        numbers, _ = self.made[which]
        place = native.Place.make(BF16, *numbers.shape, [0], 0, 0, -1, 0)
        x, out = x.contiguous(), torch.empty(len(x), len(numbers))
        native.linear(place, numbers.data_ptr(), BF16, x.data_ptr(), 0, len(x), out.data_ptr(), 0, True, 1)
        return out

    def run(self, count: int, pieces: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Out of ``count`` tokens, and the cache's keys and values with room for 3 more."""
        keys, values = (torch.full((self.kv_heads, count + 3, self.dim), math.nan, dtype=torch.bfloat16) for _ in range(2))
        out, first = torch.empty(count, self.hidden), 0
        for length in pieces:
            kv = native.Kv.make(keys.data_ptr(), values.data_ptr(), 0, 64 * self.dim, (count + 3) * self.dim)
            native.attention(
                self.of, self.x[first].data_ptr(), 0, native.Spans.make([length], [first], [0], [0]), self.cos[first].data_ptr(),
                self.sin[first].data_ptr(), kv, out[first].data_ptr(), True, 2,
            )  # fmt: skip
            first += length
        return out, keys, values

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: len(x)], self.sin[: len(x)]
        if cos.shape[1] < self.turned:
            cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
        return turn(x, cos, sin) if self.rope == "halves" else turn_pairs(x, cos, sin, self.rope == "pairs apart")

    def twin(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made, gates = list[torch.Tensor](), torch.ones(0)
        for which in range(3):
            y = self.product(which, self.x[:count])
            if self.gated and which == 0:
                y, gates = (part.flatten(1) for part in y.view(count, self.heads, -1).chunk(2, dim=-1))
            if self.norms == "all" and which < 2:
                y = normalize(y, self.norm_weights[which].float(), 1e-6)
            if self.clip:
                y = y.clamp(-self.clip, self.clip)
            y = y.view(count, -1, self.dim)
            by_head = self.norms == "head" and which < 2
            if by_head and not self.after:
                y = normalize(y, self.norm_weights[which].float(), 1e-6)
            y = y if which == 2 else self.turn(y)
            if by_head and self.after:
                y = normalize(y, self.norm_weights[which].float(), 1e-6)
            if self.every and which == 0:
                y = y * self.scales[(torch.arange(count) // self.every).clamp(max=4)][:, None, None]
            made.append(y)
        keys, values = made[1].bfloat16(), made[2].bfloat16()
        attended = attend(made[0], keys, values, scaling=0.3, window=self.window or None, sinks=self.sinks)
        attended = attended.flatten(1) * sigmoid(gates) if self.gated else attended.flatten(1)
        return self.product(3, attended), keys.transpose(0, 1), values.transpose(0, 1)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"norms": "head"},
        {"norms": "all", "clip": 1.5},
        {"norms": "head", "clip": 1.0},
        {"turned": 10},
        {"window": 7, "sinks": True, "half": True},
        {"rope": "pairs", "turned": 14},
        {"rope": "pairs apart", "half": True},
        {"norms": "head", "after": True, "every": 9},
        {"norms": "head", "gated": True, "turned": 12},
    ],
    ids=lambda kind: ", ".join(kind) or "plain",
)
def test_attention(instructions: str, kind: dict[str, Any]) -> None:
    """The twins of its steps one by one, and the same bits in any cut; nothing beyond the tokens is written."""
    attention = OwnAttention(**kind)
    want = attention.twin(75)
    for pieces in ([75], [1, 1, 70, 3], [40, 35]):
        out, *cache = attention.run(75, pieces)
        assert_same(out, want[0], str(pieces))
        for got, states in zip(cache, want[1:], strict=True):
            assert_same(got[:, :75], states, str(pieces))
            assert got[:, 75:].isnan().all()


def test_passes_of_many_tokens(instructions: str) -> None:
    """More than go through a layer at once."""
    attention = OwnAttention()
    attention.x, attention.cos, attention.sin = (
        states.repeat(2, 1)[:300] for states in (attention.x, attention.cos, attention.sin)
    )
    assert_same(attention.run(300, [300])[0], attention.run(300, [120, 180])[0])


@pytest.mark.parametrize("shared", [False, True])
def test_layer_end(instructions: str, shared: bool) -> None:
    """Without a norm of what is added, and with one."""
    generator = torch.Generator().manual_seed(0)
    residual, beside = (torch.randn(2, 70, generator=generator).bfloat16() for _ in range(2))
    rows, weights, factors = torch.randn(2, 3, 70, generator=generator), torch.rand(2, 3, generator=generator), torch.rand(2, 1)
    out = torch.empty_like(residual)
    address = beside.data_ptr() if shared else 0
    norm = torch.rand(70, generator=generator)
    summed = combine(rows, weights)
    if shared:
        summed = fused(factors, beside, summed)
    for added, at in ((summed, 0), (normalize(summed, norm, 1e-5), norm.data_ptr())):
        native.layer_end(
            residual.data_ptr(), rows.data_ptr(), weights.data_ptr(), 2, 3, address, factors.data_ptr(), 0.75,
            native.Norm.make(at, 0, 0, 1e-5, 0.0, True, False), 70, out.data_ptr(), 2,
        )  # fmt: skip
        assert_same(out, fused(0.75, added, residual).bfloat16())
