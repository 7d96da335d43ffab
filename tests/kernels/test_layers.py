"""Norm, MLP, attention and a whole layer's head in one call each, against torch in float64, for every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from fate_moe.kernels.elementary import combine, fused
from fate_moe.kernels.native import BF16, matrix_place, native
from tests.kernels.test_cpu import SETS, a_blob
from tests.support.bits import assert_same

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

BF16_EPSILON = torch.finfo(torch.bfloat16).eps


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


@pytest.mark.parametrize("length", [0, 1, 15, 40])
@pytest.mark.parametrize("normed", [False, True])
def test_attention(instructions: str, length: int, normed: bool) -> None:
    heads, kv_heads, dim, hidden, room = 4, 2, 24, 70, length + 3
    generator = torch.Generator().manual_seed(length)
    made = [matrix(n, hidden, generator) for n in (heads * dim, kv_heads * dim, kv_heads * dim)] + [
        matrix(hidden, heads * dim, generator)
    ]
    norms = [torch.rand(dim, generator=generator).bfloat16() + 1 for _ in range(2)]
    addresses = [norm.data_ptr() if normed else 0 for norm in norms]
    of = native.Attention.make(*(at for _, at in made), heads, kv_heads, dim, 0.3, *addresses, 1, 1e-6)
    keys, values = (torch.randn(kv_heads, room, dim, generator=generator).bfloat16() for _ in range(2))
    before = keys.clone(), values.clone()
    angles = torch.rand(dim // 2, generator=generator).repeat(2) * 3
    cos, sin, x = angles.cos(), angles.sin(), torch.randn(hidden, generator=generator)
    out = torch.empty(hidden)
    native.attention(
        of,
        x.data_ptr(),
        0,
        cos.data_ptr(),
        sin.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        length,
        room,
        out.data_ptr(),
        True,
        2,
    )
    q, k, v = ((x.double() @ weight.double().T).view(-1, dim) for weight, _ in made[:3])
    if normed:
        q, k = (
            y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double() for y, norm in zip((q, k), norms, strict=True)
        )
    q, k = (y * cos.double() + torch.cat([-y[:, dim // 2 :], y[:, : dim // 2]], 1) * sin.double() for y in (q, k))
    for cache, old, new in ((keys, before[0], k), (values, before[1], v)):
        assert_near(cache[:, length], new, BF16_EPSILON)
        untouched = [position for position in range(room) if position != length]
        assert torch.equal(cache[:, untouched], old[:, untouched])
    past_keys, past_values = (cache[:, : length + 1].double().repeat_interleave(2, 0) for cache in (keys, values))
    attended = scaled_dot_product_attention(q.view(heads, 1, dim), past_keys, past_values, scale=0.3).reshape(-1)
    assert_near(out, attended @ made[3][0].double().T, 1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_layer_end(instructions: str, shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    residual, beside = (torch.randn(1, 70, generator=generator).bfloat16() for _ in range(2))
    rows, weights = torch.randn(3, 70, generator=generator), torch.rand(3, generator=generator)
    out = torch.empty_like(residual)
    address = beside.data_ptr() if shared else 0
    native.layer_end(residual.data_ptr(), rows.data_ptr(), weights.data_ptr(), 3, address, 0.25, 70, out.data_ptr())
    summed = combine(rows.unsqueeze(0), weights.unsqueeze(0))
    if shared:
        summed = fused(0.25, beside, summed)
    assert_same(out, (summed + residual.float()).bfloat16())
