"""Dense weights of one byte a weight: the same numbers as the store's, and a matvec within twice its twin's error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fate_moe.gpu.dense import ByteLinear, joined
from fate_moe.kernels.reference import dequantize
from fate_moe.kernels.triton_dense import matvec_kernel
from fate_moe.quant.blob import encode, views
from fate_moe.store.format import blob_layout


def quantized(precision: str, rows: int, cols: int, seed: int = 0) -> tuple[ByteLinear, torch.Tensor]:
    """A matrix from a blob of a store, and its numbers by the reference."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * cols**-0.5
    layout = blob_layout(precision, {"weight": (rows, cols)}, "F32")
    blob = torch.frombuffer(encode(layout, {"weight": weight}), dtype=torch.uint8)
    parts = views(layout, blob)
    planes = [parts[f"weight.plane{i}"] for i in range(len(layout.plane_widths))]
    numbers = dequantize(planes, parts["weight.scale"], parts["weight.zero"], cols=cols, group_size=64, widths=layout.plane_widths)
    return ByteLinear.from_blob(blob, layout, (rows, cols), None, torch.float32), numbers


def matvec(matrix: ByteLinear, x: torch.Tensor, norm: torch.Tensor | None = None, silu: bool = False) -> torch.Tensor:
    rows = matrix.out_features // (2 if silu else 1)
    out = torch.zeros(rows)
    matvec_kernel[(1, -(-rows // 4))](
        x, out if norm is None else norm, out, matrix.codes, matrix.scale, matrix.zero, out, out, out, out, out, out, 1e-6, rows, 0,
        cols=matrix.in_features, rows=rows, CODES=True, NORM=norm is not None, ROUNDS=True, CENTERED=False, NORM_BIAS=False,
        BIAS=False, RESIDUAL=False, GATE=False, SILU=silu, STAGE=False, STAGE_PLANES=0, BN=4, BK=64,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "cols"), [(10, 128), (7, 100)])
def test_numbers_and_products_are_the_stores(precision: str, rows: int, cols: int) -> None:
    matrix, numbers = quantized(precision, rows, cols)
    assert torch.equal(matrix.weight, numbers)
    x = torch.randn(cols, generator=torch.Generator().manual_seed(1))
    exact = numbers.double() @ x.double()
    twin = (numbers @ x).double()
    assert (matvec(matrix, x).double() - exact).abs().max() <= 2 * (twin - exact).abs().max() + 1e-6 * exact.abs().max()
    torch.testing.assert_close(matrix(x[None])[0], numbers @ x)


def test_gate_and_up_halves_after_a_norm() -> None:
    matrix, numbers = quantized("int8", 12, 128)
    x, norm = torch.randn(2, 128, generator=torch.Generator().manual_seed(2))
    normed = norm * x * torch.rsqrt(x.pow(2).mean() + 1e-6)
    gate, up = (numbers @ normed).chunk(2)
    torch.testing.assert_close(matvec(matrix, x, norm, silu=True), torch.nn.functional.silu(gate) * up)


def test_joined_matrices_are_stored_once() -> None:
    parts = [quantized("int8", rows, 128, seed=rows)[0] for rows in (8, 4)]
    numbers = torch.cat([part.weight for part in parts])
    whole = joined(parts)
    assert isinstance(whole, ByteLinear)
    assert torch.equal(whole.weight, numbers)
    assert torch.equal(torch.cat([part.weight for part in parts]), numbers)
    assert parts[1].codes.untyped_storage().data_ptr() == whole.codes.untyped_storage().data_ptr()


def test_rounding_is_within_a_step() -> None:
    weight = torch.randn(6, 100)
    rounded = ByteLinear.rounded(weight)
    step = rounded.scale.float().repeat_interleave(64, 1)[:, :100]
    assert ((rounded.weight - weight).abs() <= step * 0.75).all()  # half of one, and what fp16 takes from 255 steps
