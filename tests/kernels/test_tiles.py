"""Products with many tokens by matrix tiles (AMX) against their torch twins: bf16 weights of ``dequantize``, bf16 inner values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from fate_moe.kernels.cpu import SlotExperts
from fate_moe.kernels.native import DTYPES, matrix_place, native
from fate_moe.kernels.reference import dequantize, expert_mlp, expert_weights
from fate_moe.quant.blob import encode, views
from fate_moe.quant.choices import GROUP_SIZES
from fate_moe.store.format import blob_layout
from tests.kernels.test_cpu import EPSILON, FAMILIES, WIDTHS, a_blob, both_ways

if native is None or not native.has_tiles():
    pytest.skip("this processor has no matrix tiles", allow_module_level=True)


def check_linear(kind: str, rows: int, cols: int, tokens: int, planes: int, seed: int, group: int) -> None:
    """Error against float64 at most twice that of torch's GEMM on the same weights and in the same dtype, and one rounding more."""
    layout, blob, parts = a_blob(kind, rows, cols, seed, group)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()
    stored = [parts[f"W.plane{i}"] for i in range(len(WIDTHS[kind]))]
    shared: dict[str, Any] = {
        "cols": cols,
        "group_size": group,
        "widths": WIDTHS[kind],
        "num_planes": planes if kind == "int4" else None,
    }
    weights = dequantize(stored, parts["W.scale"], parts["W.zero"], **shared).bfloat16()
    bias = parts["W_bias"].float()
    true = linear(x.double(), weights.double(), bias.double())
    place = matrix_place(layout, "W", (rows, cols), "W_bias")
    for dtype in (torch.float32, torch.bfloat16):
        got = torch.full((tokens, rows), torch.nan, dtype=dtype)
        native.linear_tiled(place, blob.data_ptr(), planes, x.data_ptr(), tokens, got.data_ptr(), DTYPES[dtype], 2)
        twin = linear(x.to(dtype), weights.to(dtype), bias.to(dtype))
        terms = linear(x.double().abs(), weights.double().abs(), bias.double().abs())
        # Room for rounding the result to ``dtype``: the twin's results may happen to lie near numbers of that type.
        rounding = torch.finfo(dtype).eps * true.abs()
        allowed = 2 * (twin - true).abs().max() + rounding + EPSILON * terms
        assert ((got - true).abs() <= allowed).all()


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize(("kind", "planes"), [("int4", 3), ("int4", 2), ("int4", 1), ("int8", 3)])
def test_odd_shapes(kind: str, planes: int, group: int) -> None:
    """Cut groups, blocks and tiles; one to seventeen tiles of tokens, in one pass or two."""
    for rows, cols, tokens in ((1, 1, 9), (15, 63, 16), (16, 64, 17), (31, 130, 40), (33, 250, 64), (48, 256, 65), (70, 530, 272)):
        check_linear(kind, rows, cols, tokens, planes, rows, group)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["int4", "int8"]),
    st.integers(1, 80),
    st.integers(1, 600),
    st.integers(1, 90),
    st.integers(1, 3),
    st.integers(0, 10**6),
    st.sampled_from(GROUP_SIZES),
)
def test_any_shape(kind: str, rows: int, cols: int, tokens: int, planes: int, seed: int, group: int) -> None:
    check_linear(kind, rows, cols, tokens, planes, seed, group)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_a_tokens_result_does_not_depend_on_its_company(group: int) -> None:
    layout, blob, _ = a_blob("int4", 70, 1408, 0, group)
    place = matrix_place(layout, "W", (70, 1408), "W_bias")
    x = torch.randn(300, 1408, generator=torch.Generator().manual_seed(1)).bfloat16()

    def product(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), 70)
        native.linear_tiled(place, blob.data_ptr(), 3, x.data_ptr(), len(x), out.data_ptr(), 0, 2)
        return out

    together = product(x)
    for first, count in ((0, 9), (5, 20), (100, 33), (131, 70), (44, 256)):
        assert torch.equal(product(x[first : first + count].clone()), together[first : first + count])


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("family", ["silu", "gpt_oss", "plain_relu2"])
@pytest.mark.parametrize(("tokens", "group"), [(40, 64), (600, 64), (40, 32), (40, 128)])
def test_experts(kind: str, family: str, tokens: int, group: int) -> None:
    """Together or one by one, at any number of planes: the same bits, and as near the truth as torch in bf16."""
    module, hidden, inner, top_k = FAMILIES[family], 130, 70, 2
    generator = torch.Generator().manual_seed(tokens)
    up, wide = ("gate_up_proj", 2 * inner) if module.has_gate else ("up_proj", inner)
    shapes: dict[str, tuple[int, ...]] = {
        up: (wide, hidden),
        f"{up}_bias": (wide,),
        "down_proj": (hidden, inner),
        "down_proj_bias": (hidden,),
    }
    layout = blob_layout("int4", shapes, "BF16", group, WIDTHS[kind])
    memory = bytearray()
    for _ in range(4):
        memory += encode(layout, {name: (torch.randn(shape, generator=generator) / 8).bfloat16() for name, shape in shapes.items()})
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in range(tokens)]).flatten().tolist()
    rows = {expert: [row for row, chosen in enumerate(index) if chosen == expert] for expert in set(index)}
    assert min(map(len, rows.values())) > 8
    ready = [(expert, 3 - expert) for expert in rows]
    planes = {expert: 1 + expert % 3 for expert in rows} if kind == "int4" else {}
    slots = SlotExperts(memory, range(0, len(memory), layout.length), [[layout] * 4], [shapes])
    together = both_ways(slots, module, ready, rows, x, planes)
    for expert, slot in ready:
        blob = torch.frombuffer(memory, dtype=torch.uint8)[slot * layout.length :]
        weights = expert_weights(layout, views(layout, blob), shapes, torch.bfloat16, planes.get(expert))
        inputs = x[torch.tensor(rows[expert]) // top_k]
        true = expert_mlp(module, {name: w.double() for name, w in weights.items()}, inputs.double())
        twin = expert_mlp(module, weights, inputs)
        assert (together[rows[expert]] - true).abs().max() <= 2 * (twin - true).abs().max()
