"""Byte codes to numbers, for products of many rows: torch's GEMM wants the matrix written out."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expand_kernel"]


@triton.jit
def expand_kernel(codes, scale, zero, out, rows, cols, groups, BN: tl.constexpr, BK: tl.constexpr):
    """out[r, c] = scale[r, c // 64] * codes[r, c] - zero[r, c // 64], rounded to out's dtype. Grid (rows / BN, cols / BK).

    ``codes`` uint8 [rows, groups * 64], ``scale`` and ``zero`` fp16 [rows, groups], ``out`` [rows, cols].
    """
    r = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    mask = (r < rows) & (c < cols)
    s = tl.load(scale + r * groups + c // 64, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(zero + r * groups + c // 64, mask=mask, other=0.0).to(tl.float32)
    q = tl.load(codes + r * (groups * 64) + c, mask=mask, other=0).to(tl.float32)
    tl.store(out + r * cols + c, (s * q - z).to(out.dtype.element_ty), mask=mask)
