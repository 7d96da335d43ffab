"""The min/max solver's bound, with ordinary weights and at the limits of fp16, and the Solver interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fate_moe.config import OffloadConfig
from fate_moe.errors import ConfigError
from fate_moe.quant import solver
from fate_moe.quant.blob import encode, views
from fate_moe.quant.choices import SOLVER_NAMES
from fate_moe.quant.solver import SOLVERS, minmax
from fate_moe.store.convert import convert
from fate_moe.store.format import blob_layout

BITS = 4


def restored(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """scale * q - zero in fp64, and each weight's step."""
    cols = codes.shape[1]
    step, offset = (x.double().repeat_interleave(group_size, 1)[:, :cols] for x in (scale, zero))
    return step * codes.double() - offset, step


def check_half_a_step(weights: Tensor, group_size: int = 64, bits: int = BITS) -> None:
    codes, scale, zero = minmax(weights, bits, group_size)
    groups = -(-weights.shape[1] // group_size)
    assert codes.dtype == torch.uint8
    assert codes.shape == weights.shape
    assert scale.dtype == zero.dtype == torch.float16
    assert scale.shape == zero.shape == (weights.shape[0], groups)
    assert scale.isfinite().all()
    assert zero.isfinite().all()
    assert (scale >= 0).all()
    assert int(codes.max()) < 2**bits
    got, step = restored(codes, scale, zero, group_size)
    # fp32 arithmetic on w + zero can move a weight that lies between two codes by its own rounding.
    rounding = torch.finfo(torch.float32).eps * (weights.double().abs() + 16 * step)
    assert ((got - weights.double()).abs() <= step / 2 + rounding).all()


# Magnitudes over all of fp16's range, subnormals too; groups may be constant, one-sided, or far from zero.
@given(
    rows=st.integers(1, 3),
    cols=st.integers(1, 150),
    exponent=st.integers(-26, 15),
    shift=st.floats(-8, 8),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    group_size=st.sampled_from([8, 64]),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None)
def test_no_weight_is_off_by_more_than_half_a_step(
    rows: int, cols: int, exponent: int, shift: float, bits: int, group_size: int, seed: int
) -> None:
    weights = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) * 2 - 1 + shift
    check_half_a_step((weights * 2.0**exponent).clamp(-65504, 65504), group_size, bits)


@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 64,
        [0.1] * 64,
        [-0.1] * 64,
        [1e-8] * 64,  # below the smallest subnormal
        [65504.0] * 64,
        [-65504.0, 65504.0] * 32,
        [0.0] * 63 + [3.0],
        [1000.0] * 63 + [1000.01],  # one fp16 step at 1000 is 0.5
        [5.0],
        [-1.0, 1.0, -1.0] * 30,
    ],
)
def test_edges(row: list[float]) -> None:
    check_half_a_step(torch.tensor([row]))


def test_constant_groups_are_exact_where_fp16_has_them() -> None:
    codes, scale, zero = minmax(torch.full((2, 64), 0.25), BITS, 64)
    assert torch.equal(restored(codes, scale, zero, 64)[0], torch.full((2, 64), 0.25, dtype=torch.float64))


def test_a_steps_size_is_the_groups_range() -> None:
    """The bound above would also hold for larger steps: a step is the range over 15, up to fp16's rounding."""
    weights = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    codes, scale, _ = minmax(weights, BITS, 64)
    grouped = weights.view(8, 2, 64)
    exact = (grouped.amax(2) - grouped.amin(2)) / 15
    assert (scale.float() >= exact).all()
    assert (scale.float() <= exact * 1.003).all()  # two roundings to fp16 (2**-10 each), one of them of the zero
    assert set(codes.flatten().tolist()) == set(range(16))


def test_beyond_fp16_is_clamped_and_finite() -> None:
    codes, scale, zero = minmax(torch.tensor([[-1e6, 0.0, 1e5] + [1.0] * 61]), BITS, 64)
    assert scale.isfinite().all()
    assert zero.isfinite().all()
    got, _ = restored(codes, scale, zero, 64)
    assert got[0, 0] == -65504


def test_ragged_columns_do_not_widen_the_last_group() -> None:
    """Missing columns repeat the last one, so the group's range is that of its weights."""
    weights = torch.cat([torch.randn(3, 64), torch.rand(3, 5) + 100], 1)
    _, scale, zero = minmax(weights, BITS, 64)
    assert scale.shape == (3, 2)
    assert (scale[:, 1] <= 1 / 15 + 0.05).all()
    assert (zero[:, 1] <= -99.9).all()
    assert torch.equal(minmax(weights[:, 64:], BITS, 64)[1], scale[:, 1:]), "groups do not see each other"


def test_ragged_blob() -> None:
    """In a blob, the bits of missing columns and the gaps between parts are zero."""
    shapes: dict[str, tuple[int, ...]] = {"down_proj": (3, 70), "down_proj_bias": (3,)}
    layout = blob_layout("int4", shapes, "F32")
    tensors = {"down_proj": torch.randn(3, 70), "down_proj_bias": torch.randn(3)}
    blob = encode(layout, tensors)
    parts = views(layout, torch.frombuffer(blob, dtype=torch.uint8))
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "down_proj.scale": (3, 2),
        "down_proj.zero": (3, 2),
        "down_proj_bias": (3,),
        "down_proj.plane0": (3, 2, 16),
        "down_proj.plane1": (3, 2, 8),
        "down_proj.plane2": (3, 2, 8),
    }
    assert torch.equal(parts["down_proj_bias"], tensors["down_proj_bias"])
    assert not parts["down_proj.plane1"][:, 1, 1:].any()
    assert not parts["down_proj.plane0"][:, 1, 6:].any()
    used = bytearray(len(blob))
    for part in layout.parts:
        length = parts[part.name].numel() * parts[part.name].element_size()
        used[part.offset : part.offset + length] = b"\1" * length
    assert not any(byte for byte, inside in zip(blob, used, strict=True) if not inside)


def test_any_solver_can_be_used(checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[int, ...], int, int]] = []

    def all_zero(weights: Tensor, bits: int, group_size: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        asked.append((tuple(weights.shape), bits, group_size))
        assert weights.dtype == torch.float32
        groups = torch.zeros(weights.shape[0], -(-weights.shape[1] // group_size), dtype=torch.float16)
        return torch.zeros_like(weights, dtype=torch.uint8), groups, groups

    monkeypatch.setitem(solver.SOLVERS, "zero", all_zero)
    first = convert(checkpoint_folder, tmp_path / "zero", "int4", solver="zero")
    second = convert(checkpoint_folder, tmp_path / "minmax", "int4", solver="minmax")
    assert set(asked) == {((64, 64), 4, 64), ((64, 32), 4, 64)}
    names = ["experts-00001-of-00002.safetensors"]
    assert [(first / name).read_bytes() for name in names] != [(second / name).read_bytes() for name in names]


@pytest.fixture
def checkpoint_folder(checkpoint: object) -> Path:
    return checkpoint("qwen2_moe")  # type: ignore[operator,no-any-return]


def test_unknown_solvers_and_precisions_are_errors(checkpoint_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"solver.*'hqqq'.*minmax"):
        convert(checkpoint_folder, tmp_path / "store", "int4", solver="hqqq")
    with pytest.raises(ConfigError, match=r"group_size 48 is not one of 32, 64, 128"):
        convert(checkpoint_folder, tmp_path / "store", "int4", group_size=48)
    with pytest.raises(ConfigError, match=r"precision.*'int3'.*int4"):
        convert(checkpoint_folder, tmp_path / "store", "int3")
    with pytest.raises(ConfigError):
        OffloadConfig.from_options({"precision": "int3"})
    with pytest.raises(ValueError, match="int3"):
        blob_layout("int3", {"down_proj": (4, 4)}, "F32")
    assert not list(tmp_path.iterdir())
    assert tuple(SOLVERS) == SOLVER_NAMES
