"""Multi-head latent attention: every instruction set gives the twin's bits, for any cut of the rows, and the twin is attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from fate_moe.kernels.attention import attend_latent, quantized, row_width
from fate_moe.kernels.elementary import normalize, turn, turn_pairs
from fate_moe.kernels.native import BF16, ROPES, matrix_place, native
from fate_moe.kernels.reference import dequantize
from tests.kernels.test_cpu import WIDTHS, a_blob
from tests.kernels.test_layers import instructions, matrix
from tests.support.bits import assert_same

__all__ = ["instructions"]  # a fixture

HEADS, NOPE, ROPE, RANK, VALUE, HIDDEN, QUERY_RANK = 3, 20, 8, 32, 24, 70, 40


class OwnLatent:
    """Attention with bf16 matrices, but for kv_b, and the twins of its steps on what the extension's products give."""

    def __init__(self, two_steps: bool, kv_b: str, rope: str) -> None:
        generator = torch.Generator().manual_seed(0)
        queries = HEADS * (NOPE + ROPE)
        shapes = {"q_a": (QUERY_RANK, HIDDEN), "q": (queries, QUERY_RANK if two_steps else HIDDEN), "kv_a": (RANK + ROPE, HIDDEN)}
        self.made = {name: matrix(*shape, generator) for name, shape in [*shapes.items(), ("o", (HIDDEN, HEADS * VALUE))]}
        self.norms = [torch.rand(size, generator=generator).bfloat16() + 0.5 for size in (QUERY_RANK, RANK)]
        shape = HEADS * (NOPE + VALUE), RANK
        if kv_b == "bf16":
            self.up, up_at = matrix(*shape, generator)
            self.numbers = self.up.float()
        else:
            layout, self.up, parts = a_blob(kv_b, *shape, 7)
            up_at = native.Weight.make(matrix_place(layout, "W", shape), self.up.data_ptr(), 0, 0)
            planes = [parts[f"W.plane{i}"] for i in range(len(WIDTHS[kv_b]))]
            self.numbers = dequantize(planes, parts["W.scale"], parts["W.zero"], cols=RANK, group_size=64, widths=WIDTHS[kv_b])
        self.two_steps, self.rope = two_steps, rope
        none = native.Weight.make(native.Place.make(BF16, 0, 64, [0], 0, 0, -1, 0), 0, 0, 0)
        at = {name: weight for name, (_, weight) in self.made.items()}
        latent = native.Latent.make(at["q_a"] if two_steps else none, at["kv_a"], up_at, NOPE, VALUE)
        norms = [native.Norm.make(norm.data_ptr(), 0, 1, 1e-6, 0.0, True, False) for norm in self.norms]
        self.of = native.Attention.make(
            at["q"], none, none, at["o"], HEADS, 1, RANK + ROPE, ROPE, ROPE, ROPES.index(rope), 0.3, *norms, False, 0.0, 0, 0, 0,
            latent,
        )  # fmt: skip
        angles = torch.rand(80, ROPE // 2, generator=generator).repeat(1, 2) * 3
        self.cos, self.sin, self.x = angles.cos(), angles.sin(), torch.randn(80, HIDDEN, generator=generator)

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        numbers, _ = self.made[name]
        x, out = x.contiguous(), torch.empty(len(x), len(numbers))
        place = native.Place.make(BF16, *numbers.shape, [0], 0, 0, -1, 0)
        native.linear(place, numbers.data_ptr(), BF16, x.data_ptr(), 0, len(x), out.data_ptr(), 0, True, 1)
        return out

    def run(self, count: int, pieces: Sequence[int], int8: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Out of ``count`` tokens, and the cache [count, rank + rope] with room for 3 more."""
        keys = torch.full((count + 3, RANK + ROPE), math.nan, dtype=torch.bfloat16)
        if int8:
            keys = torch.full((count + 3, row_width("int8", RANK + ROPE)), 255, dtype=torch.uint8)  # its scales are NaN
        out, first = torch.empty(count, HIDDEN), 0
        for length in pieces:
            kv = native.Kv.make(keys.data_ptr(), 0, 0, 64 * keys.shape[1], 0, int(int8))
            native.attention(
                self.of, self.x[first].data_ptr(), 0, native.Spans.make([length], [first], [0], [0]), self.cos[first].data_ptr(),
                self.sin[first].data_ptr(), kv, out[first].data_ptr(), True, 2,
            )  # fmt: skip
            first += length
        return out, keys

    def twin(self, count: int, int8: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, cos, sin = self.x[:count], self.cos[:count], self.sin[:count]

        def turned(y: torch.Tensor) -> torch.Tensor:
            return turn(y, cos, sin) if self.rope == "halves" else turn_pairs(y, cos, sin, self.rope == "pairs apart")

        made = normalize(self.product("q_a", x), self.norms[0].float(), 1e-6) if self.two_steps else x
        queries = self.product("q", made).view(count, HEADS, -1)
        queries = torch.cat([queries[..., :NOPE], turned(queries[..., NOPE:])], -1)
        row = self.product("kv_a", x)
        latent = normalize(row[:, :RANK], self.norms[1].float(), 1e-6)
        keys = torch.cat([latent, turned(row[:, RANK:].unsqueeze(1))[:, 0]], -1).bfloat16()
        keys = quantized(keys) if int8 else keys
        attended = attend_latent(queries, keys, self.numbers.view(HEADS, -1, RANK), nope=NOPE, scaling=0.3)
        return self.product("o", attended.flatten(1)), keys


@pytest.mark.parametrize(
    ("two_steps", "kv_b", "rope", "int8"),
    [(True, "bf16", "pairs apart", False), (False, "int4", "pairs", True), (True, "int8", "halves", False)],
)
def test_latent_attention(instructions: str, two_steps: bool, kv_b: str, rope: str, int8: bool) -> None:
    attention = OwnLatent(two_steps, kv_b, rope)
    want, keys = attention.twin(70, int8)
    for pieces in ([70], [1, 1, 65, 3]):
        out, cached = attention.run(70, pieces, int8)
        assert_same(out, want, str(pieces))
        assert_same(cached[:70], keys, str(pieces))
        assert bool((cached[70:] == 255).all()) if int8 else cached[70:].isnan().all()


def test_the_twin_is_attention_on_keys_and_values_of_each_head() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, weights = torch.randn(5, 3, 12, generator=generator), torch.randn(3, 8 + 6, 16, generator=generator)
    keys = torch.randn(70, 20, generator=generator).bfloat16()
    got = attend_latent(queries, keys, weights, nope=8, scaling=0.2)
    latent, turned = keys.double()[:, :16], keys.double()[:, 16:]
    both = torch.einsum("sc,hvc->hsv", latent, weights.double())
    whole = torch.cat([both[..., :8], turned.expand(3, -1, -1)], -1)
    scores = 0.2 * torch.einsum("thd,hsd->hts", queries.double(), whole)
    scores = scores.masked_fill(torch.ones(5, 70, dtype=torch.bool).triu(66), -torch.inf)
    want = torch.einsum("hts,hsv->thv", scores.softmax(-1), both[..., 8:])
    assert 0 < (got - want).abs().max() < 1e-5
