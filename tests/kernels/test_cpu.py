"""The C++ kernels against their torch twins, for every instruction set that this machine has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe.core import BlobLayout
from fate_moe.kernels.activations import find_activation
from fate_moe.kernels.cpu import SlotExperts
from fate_moe.kernels.elementary import combine
from fate_moe.kernels.native import BF16, DTYPES, matrix_place, native
from fate_moe.kernels.reference import dequantize, expert_mlp, expert_weights, linear_quantized
from fate_moe.quant.blob import encode, views
from fate_moe.quant.choices import GROUP_SIZES
from fate_moe.store.format import blob_layout

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

EPSILON = torch.finfo(torch.float32).eps
WIDTHS = {"int4": (2, 1, 1), "int8": (8,)}
SETS = native.instruction_sets()


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    native.choose(request.param)
    yield request.param
    native.choose(SETS[0])


def a_blob(kind: str, rows: int, cols: int, seed: int, group: int = 64) -> tuple[BlobLayout, torch.Tensor, dict[str, torch.Tensor]]:
    """A matrix W [rows, cols] with a bias, encoded, in a buffer that ends where the blob's last part does (for the sanitizers)."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"W": (rows, cols), "W_bias": (rows,)}
    lossless = kind == "bf16"
    layout = blob_layout("lossless", shapes, "BF16") if lossless else blob_layout("int4", shapes, "F32", group, WIDTHS[kind])
    tensors = {"W": torch.randn(rows, cols, generator=generator), "W_bias": torch.randn(rows, generator=generator)}
    whole = torch.frombuffer(encode(layout, tensors), dtype=torch.uint8)
    parts = views(layout, whole)
    end = max(part.offset + parts[part.name].nbytes for part in layout.parts)
    return layout, whole[:end].clone(), parts


def native_linear(layout: BlobLayout, blob: torch.Tensor, shape: tuple[int, int], x: torch.Tensor, planes: int, exact: bool) -> Any:
    place = matrix_place(layout, "W", shape, "W_bias")
    out = torch.full((len(x), shape[0]), math.nan)
    native.linear(place, blob.data_ptr(), planes, x.data_ptr(), DTYPES[x.dtype], len(x), out.data_ptr(), 0, exact, 2)
    return out


def check_linear(kind: str, rows: int, cols: int, tokens: int, planes: int, exact: bool, seed: int, group: int = 64) -> None:
    """The twin's bits with int8 activations; else an error against float64 at most twice the twin's own, and a rounding of the
    terms' magnitudes where the twin was lucky."""
    layout, blob, parts = a_blob(kind, rows, cols, seed, group)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed + 1))
    bias = parts["W_bias"].float()
    got = native_linear(layout, blob, (rows, cols), x, planes, exact)
    if kind == "bf16":
        weights, seen = parts["W"].float(), x.double()
        twin, terms = x @ weights.T + bias, weights.abs()
    else:
        quantized = [parts[f"W.plane{i}"] for i in range(len(WIDTHS[kind]))], parts["W.scale"], parts["W.zero"]
        shared: dict[str, Any] = {"group_size": group, "widths": WIDTHS[kind], "num_planes": planes if kind == "int4" else None}
        twin = linear_quantized(x, *quantized, **shared, exact=exact) + bias
        if not exact:
            assert torch.equal(got, twin), f"{(got != twin).sum()} of {got.numel()} differ, first {(got - twin).abs().max()}"
            return
        weights = dequantize(*quantized, cols=cols, **shared)
        planes_of, scale_of, zero_of = quantized
        terms = dequantize(planes_of, scale_of, -zero_of.abs(), cols=cols, **shared)  # scale * q and zero nearly cancel
        seen = x.double()
    true = seen @ weights.double().T + bias.double()
    rounding = EPSILON * (seen.abs() @ terms.double().T + bias.double().abs())
    error, allowed = (got - true).abs(), 2 * (twin - true).abs().max() + rounding
    assert (error <= allowed).all(), f"{error.max()} where the twin has {(twin - true).abs().max()}"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "group"), [*itertools.product(["int4", "int8"], GROUP_SIZES), ("bf16", 64)])
@pytest.mark.parametrize("exact", [False, True])
def test_odd_shapes_and_unaligned_heads(instructions: str, kind: str, group: int, exact: bool) -> None:
    """1 to 17 groups with whole and cut last ones, even and odd, odd rows, 1 to 9 tokens, every view."""
    for cols, tokens in zip((1, 31, 63, 64, 65, 96, 130, 192, 250, 256, 320, 530), itertools.cycle(range(1, 10)), strict=False):
        for planes in (3, 2, 1) if kind == "int4" else (3,):
            check_linear(kind, 7, cols, tokens, planes, exact, cols, group)


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize(("kind", "planes"), [("int4", 3), ("int4", 2), ("int4", 1), ("int8", 3)])
def test_many_tokens(instructions: str, kind: str, planes: int, group: int) -> None:
    """Cut groups, blocks and tiles; one to seventeen tiles of tokens, in one pass or two."""
    for rows, cols, tokens in ((1, 1, 9), (15, 63, 16), (16, 64, 17), (31, 130, 40), (33, 250, 64), (70, 530, 272), (20, 4500, 33)):
        check_linear(kind, rows, cols, tokens, planes, False, rows, group)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_rows_of_several_passes(instructions: str, group: int) -> None:
    check_linear("int4", 2, 512 * group + 96, 3, 3, False, group, group)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SETS),
    st.sampled_from(["int4", "int8", "bf16"]),
    st.sampled_from(GROUP_SIZES),
    st.integers(1, 40),
    st.integers(1, 700),
    st.integers(1, 40),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_shape(
    name: str, kind: str, group: int, rows: int, cols: int, tokens: int, planes: int, exact: bool, seed: int
) -> None:
    native.choose(name)
    try:
        check_linear(kind, rows, cols, tokens, planes, exact, seed, group)
    finally:
        native.choose(SETS[0])


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_a_tokens_result_does_not_depend_on_its_company(instructions: str, group: int) -> None:
    layout, blob, _ = a_blob("int4", 33, 1408, 0, group)
    x = torch.randn(300, 1408, generator=torch.Generator().manual_seed(1))
    together = native_linear(layout, blob, (33, 1408), x, 3, False)
    for first, count in ((0, 1), (7, 1), (299, 1), (3, 2), (9, 5), (5, 20), (100, 33), (131, 70), (44, 256)):
        some = native_linear(layout, blob, (33, 1408), x[first : first + count].clone(), 3, False)
        assert torch.equal(some, together[first : first + count])


def test_extreme_values(instructions: str) -> None:
    """Zeros, subnormal numbers, the largest half and the largest float: the twin's bits."""
    layout, blob, parts = a_blob("int4", 17, 192, 0)
    for value in (0.0, 1e-45, 1e-39, 1e-31, 1e-30, 65504.0, 3e38):
        for tokens in (1, 4, 16):
            x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * value
            quantized = [parts[f"W.plane{i}"] for i in range(3)], parts["W.scale"], parts["W.zero"]
            twin = linear_quantized(x, *quantized, group_size=64, widths=(2, 1, 1)) + parts["W_bias"].float()
            got = native_linear(layout, blob, (17, 192), x, 3, False)
            assert torch.equal(got.nan_to_num(), twin.nan_to_num())
            assert torch.equal(got.isnan(), twin.isnan())


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_infinity_and_nan_show(instructions: str, group: int) -> None:
    layout, blob, _ = a_blob("int4", 4, 128, 0, group)
    for value in (math.inf, math.nan):
        x = torch.ones(2, 128)
        x[1, 70] = value
        got = native_linear(layout, blob, (4, 128), x, 3, False)
        assert got[0].isfinite().all()
        assert got[1].isnan().all()


@pytest.mark.parametrize(("kind", "planes"), [("int4", 3), ("int4", 2), ("int4", 1), ("int8", 1)])
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_written_out_numbers_are_the_twins(instructions: str, kind: str, planes: int, group: int) -> None:
    for cols in (1, 64, 250, 256, 600, 1056):
        layout, blob, parts = a_blob(kind, 5, cols, cols, group)
        stored = [parts[f"W.plane{i}"] for i in range(len(WIDTHS[kind]))]
        shared: dict[str, Any] = {"group_size": group, "widths": WIDTHS[kind], "num_planes": planes}
        want = dequantize(stored, parts["W.scale"], parts["W.zero"], cols=cols, **shared)
        for dtype in (torch.float32, torch.bfloat16):
            got = torch.empty(5, cols, dtype=dtype)
            place = matrix_place(layout, "W", (5, cols))
            native.expand(place, blob.data_ptr(), planes, got.data_ptr(), DTYPES[dtype], 2)
            assert torch.equal(got, want.to(dtype))


def an_experts_module(gated: bool, act: Any, limit: float = math.inf, interleaved: bool = False, **numbers: float) -> Any:
    def apply_gate(x: torch.Tensor) -> torch.Tensor:
        gate, up = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        alpha, offset = numbers.get("alpha", 1.0), numbers.get("offset", 0.0)
        value = gate.clamp(max=limit)
        shown = value * torch.sigmoid(alpha * value) if act is None else act(value)
        return shown * (up.clamp(-limit, limit) + offset)

    module: Any = torch.nn.Module()
    vars(module).update(has_gate=gated, act_fn=act, _apply_gate=apply_gate, limit=limit, alpha=numbers.get("alpha", 1.0))
    return module


FAMILIES = {
    "silu": an_experts_module(True, torch.nn.functional.silu),
    "gelu": an_experts_module(True, torch.nn.functional.gelu),
    "gelu_tanh": an_experts_module(True, torch.nn.GELU("tanh")),
    "relu": an_experts_module(True, torch.relu),
    "limited": an_experts_module(True, torch.nn.functional.silu, limit=7.0),
    "gpt_oss": an_experts_module(True, None, limit=7.0, interleaved=True, alpha=1.702, offset=1.0),
    "plain_relu2": an_experts_module(False, lambda x: torch.relu(x).square()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_gates_are_found_and_accurate(instructions: str, family: str) -> None:
    module = FAMILIES[family]
    spec = find_activation(module)
    assert spec is not None
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(3)) * 8
    twin = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    true = module._apply_gate(x.double()) if module.has_gate else module.act_fn(x.double())
    got = torch.empty_like(twin)
    native.activate(spec, x.data_ptr(), got.shape[1], got.data_ptr())
    error, rounding = (got - true).abs(), 4 * EPSILON * true.abs()  # exp, two divisions or products, each rounded
    assert (error <= 2 * (twin - true).abs().max() + rounding).all()


def test_unknown_gates_are_not_mistaken() -> None:
    assert find_activation(an_experts_module(True, torch.tanh)) is None


def mlp_twin(
    module: Any, layout: BlobLayout, parts: Any, weights: dict[str, torch.Tensor], x: torch.Tensor, num_planes: int | None
) -> torch.Tensor:
    """The fused expert from the products' own twins."""

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor = weights[f"{name}_bias"]
        if not layout.plane_widths:
            return x @ weights[name].T + bias
        planes = [parts[f"{name}.plane{i}"] for i in range(len(layout.plane_widths))]
        scales = parts[f"{name}.scale"], parts[f"{name}.zero"]
        how: dict[str, Any] = {
            "group_size": layout.group_size,
            "widths": layout.plane_widths,
            "num_planes": num_planes,
            "exact": True,
        }
        return linear_quantized(x, planes, *scales, **how) + bias

    if module.has_gate:
        return product("down_proj", module._apply_gate(product("gate_up_proj", x)))
    return product("down_proj", module.act_fn(product("up_proj", x)))


def both_ways(
    slots: SlotExperts,
    module: Any,
    ready: list[tuple[int, int]],
    rows: dict[int, list[int]],
    x: torch.Tensor,
    planes: dict[int, int],
) -> torch.Tensor:
    """The outputs of ``ready`` in one call, which are those of a call for each, the last first, bit for bit."""
    together, apart = (slots.outputs(0, module, x, sum(map(len, rows.values()))) for _ in range(2))
    slots.run(0, module, ready, rows, x, together, planes)
    for item in reversed(ready):
        slots.run(0, module, [item], rows, x, apart, planes)
    assert torch.equal(together, apart)
    return together


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("family", ["silu", "gpt_oss", "plain_relu2"])
@pytest.mark.parametrize(("tokens", "group"), [(1, 64), (3, 64), (20, 64), (1, 32), (3, 128), (20, 32)])
def test_fused_experts(kind: str, family: str, tokens: int, group: int) -> None:
    """All experts in one call or one by one, at any number of planes: the same bits, and near the twin in fp32."""
    module, hidden, inner, top_k = FAMILIES[family], 130, 70, 2
    generator = torch.Generator().manual_seed(tokens)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    shapes: dict[str, tuple[int, ...]] = {
        up: (inner * (2 if module.has_gate else 1), hidden),
        f"{up}_bias": (inner * (2 if module.has_gate else 1),),
        "down_proj": (hidden, inner),
        "down_proj_bias": (hidden,),
    }
    layout = blob_layout("lossless", shapes, "BF16") if kind == "bf16" else blob_layout("int4", shapes, "F32", group, WIDTHS[kind])
    memory = bytearray()
    for _ in range(4):
        memory += encode(layout, {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()})
    x = torch.randn(tokens, hidden, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in range(tokens)]).flatten().tolist()
    rows = {expert: [row for row, chosen in enumerate(index) if chosen == expert] for expert in set(index)}
    ready = [(expert, 3 - expert) for expert in rows]
    planes = {expert: 1 + expert % 3 for expert in rows} if kind == "int4" else {}
    slots = SlotExperts(memory, range(0, len(memory), layout.length), [[layout] * 4], [shapes], exact=True)
    together = both_ways(slots, module, ready, rows, x, planes)
    for expert, slot in ready:
        blob = torch.frombuffer(memory, dtype=torch.uint8)[slot * layout.length :]
        weights = expert_weights(layout, views(layout, blob), shapes, torch.float32, planes.get(expert))
        inputs = x[torch.tensor(rows[expert]) // top_k]
        twin = mlp_twin(module, layout, views(layout, blob), weights, inputs, planes.get(expert))
        true = expert_mlp(module, {name: w.double() for name, w in weights.items()}, inputs.double())
        error = (together[rows[expert]] - true).abs().max()
        assert error <= 2 * (twin - true).abs().max() + EPSILON * true.abs().max()


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("family", ["silu", "gpt_oss", "plain_relu2"])
@pytest.mark.parametrize(("tokens", "group", "dtype"), [(1, 64, torch.float32), (7, 32, torch.bfloat16), (600, 64, torch.bfloat16)])
def test_experts_with_int8_activations(kind: str, family: str, tokens: int, group: int, dtype: torch.dtype) -> None:
    """On every instruction set, together or one by one, for one token or many: the same bits, near those of exact activations."""
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
        memory += encode(layout, {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()})
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in range(tokens)]).flatten().tolist()
    rows = {expert: [row for row, chosen in enumerate(index) if chosen == expert] for expert in sorted(set(index))}
    ready = [(expert, 3 - expert) for expert in rows]
    planes = {expert: 1 + expert % 3 for expert in rows} if kind == "int4" else {}
    places = range(0, len(memory), layout.length)
    slots, exact = (SlotExperts(memory, places, [[layout] * 4], [shapes], exact=exact) for exact in (False, True))
    outputs = []
    try:
        for name in SETS:
            native.choose(name)
            outputs.append(both_ways(slots, module, ready, rows, x, planes))
    finally:
        native.choose(SETS[0])
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    near = both_ways(exact, module, ready, rows, x, planes)
    assert (outputs[0] - near).norm() < 0.03 * near.norm()


def test_combine_is_a_weighted_sum_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    slots = SlotExperts(bytearray(4096), [0], [], [])
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (1, 7)):
        rows, weights = torch.randn(tokens * 3, 50, generator=generator), torch.rand(tokens, 3, generator=generator)
        want = combine(rows.view(tokens, 3, 50), weights)
        got = slots.combine(rows, weights, torch.empty(tokens, 50, dtype=dtype))
        assert torch.equal(got, want.to(dtype))


def test_a_matrix_without_a_kernel_says_why() -> None:
    shapes: dict[str, tuple[int, ...]] = {"W": (4, 64)}
    assert "F16" in matrix_place(blob_layout("lossless", shapes, "F16"), "W", (4, 64))
    assert "groups of 16" in matrix_place(blob_layout("int4", shapes, "F32", 16), "W", (4, 64))
    assert not isinstance(matrix_place(blob_layout("lossless", shapes, "BF16"), "W", (4, 64)), str)
    assert BF16 == 16
