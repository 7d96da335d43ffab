"""Comparing bits, and numbers at which arithmetic is most likely to differ."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

__all__ = ["EXTREMES", "assert_same", "numbers"]

EXTREMES = (0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 65504.0, -87.0, 88.0, 88.5, 1e30, -3e38, float("inf"), float("-inf"), float("nan"))


def assert_same(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """The same bits, the sign of zero included; any NaN is as good as another."""
    assert got.shape == want.shape, what
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan), what
    different = (got.float().view(torch.int32) != want.float().view(torch.int32)) & ~nan
    assert not different.any(), f"{what}: {got[different][:4].tolist()}, not {want[different][:4].tolist()}"


@st.composite
def numbers(draw: st.DrawFn, *, lengths: st.SearchStrategy[int], rows: int = 0, size: float = 0.0) -> torch.Tensor:
    """fp32 [n] or [rows, n]: normal ones of any size (or of ``size``), among them some extreme ones."""
    length, seed = draw(lengths), draw(st.integers(0, 2**32 - 1))
    size = size or draw(st.sampled_from([1e-3, 1.0, 10.0, 1e4]))
    x = size * torch.randn(max(rows, 1), length, generator=torch.Generator().manual_seed(seed))
    for value in draw(st.lists(st.sampled_from(EXTREMES), max_size=3)):
        x[draw(st.integers(0, len(x) - 1)), draw(st.integers(0, length - 1))] = value
    return x if rows else x[0]
