from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.kernels.reference import dequantize, expert_weights
from fate_moe.quant.blob import encode, views
from fate_moe.quant.planes import pack
from fate_moe.store.format import blob_layout

WIDTHS = (2, 1, 1)


@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 10**6))
def test_views_of_a_code_are_its_bins_middles(rows: int, cols: int, seed: int) -> None:
    """w = scale * q - zero at full length; the 3-bit view of q is the middle of {2v, 2v+1}, the 2-bit view of {4v .. 4v+3}."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, cols), generator=generator, dtype=torch.uint8)
    groups = -(-cols // 64)
    scale = torch.rand(rows, groups, generator=generator).half()
    zero = torch.randn(rows, groups, generator=generator).half()
    planes = pack(codes, 64, WIDTHS)
    per_column = [x.float().repeat_interleave(64, 1)[:, :cols] for x in (scale, zero)]
    for num_planes, wanted in ((3, codes.float()), (2, codes // 2 * 2 + 0.5), (1, codes // 4 * 4 + 1.5)):
        got = dequantize(planes, scale, zero, cols=cols, group_size=64, widths=WIDTHS, num_planes=num_planes)
        assert torch.equal(got, per_column[0] * wanted - per_column[1])


def test_an_encoded_expert_comes_back_within_half_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": (96, 80), "down_proj": (80, 48), "down_proj_bias": (80,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for precision in ("lossless", "int4"):
        layout = blob_layout(precision, shapes, "F32")
        parts = views(layout, torch.frombuffer(encode(layout, tensors), dtype=torch.uint8))
        weights = expert_weights(layout, parts, shapes, torch.float32)
        assert torch.equal(weights["down_proj_bias"], tensors["down_proj_bias"])
        for name in ("gate_up_proj", "down_proj"):
            error = (weights[name] - tensors[name]).abs()
            if precision == "lossless":
                assert error.max() == 0
            else:
                step = parts[f"{name}.scale"].float().repeat_interleave(64, 1)[:, : shapes[name][1]]
                assert (error <= step * 0.5001).all()
