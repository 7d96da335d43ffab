"""Activation functions on the GPU: those of ``kernels/elementary.py``, to the bit. Launch with ``enable_fp_fusion=False``."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate"]


@triton.jit
def _next(p, r, coefficient: tl.constexpr):
    """One step of Horner's rule: p * r + coefficient."""
    return tl.fma(p, r, tl.full(p.shape, coefficient, tl.float32))


@triton.jit
def exponential(x):
    """``elementary.exponential``."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))  # NaN passes
    n = (x * 1.44269504 + 12582912.0) - 12582912.0
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), x)
    r = tl.fma(n, tl.full(x.shape, 2.12194440e-4, tl.float32), r)
    p = tl.full(x.shape, 1.0 / 720.0, tl.float32)
    p = _next(p, r, 1.0 / 120.0)
    p = _next(p, r, 1.0 / 24.0)
    p = _next(p, r, 1.0 / 6.0)
    p = _next(p, r, 0.5)
    p = _next(p, r, 1.0)
    p = _next(p, r, 1.0)
    power = tl.where(n == n, n, 0.0).to(tl.int32) + 127
    return p * (power << 23).to(tl.float32, bitcast=True)


@triton.jit
def _gelu(x):
    """``elementary.gelu``."""
    z = tl.abs(x) * 0.70710678
    t = tl.div_rn(
        tl.full(x.shape, 1.0, tl.float32), tl.fma(tl.full(x.shape, 0.5, tl.float32), z, tl.full(x.shape, 1.0, tl.float32))
    )
    p = tl.full(x.shape, 0.17087277, tl.float32)
    p = _next(p, t, -0.82215223)
    p = _next(p, t, 1.48851587)
    p = _next(p, t, -1.13520398)
    p = _next(p, t, 0.27886807)
    p = _next(p, t, -0.18628806)
    p = _next(p, t, 0.09678418)
    p = _next(p, t, 0.37409196)
    p = _next(p, t, 1.00002368)
    p = _next(p, t, -1.26551223)
    tail = (0.5 * t) * exponential(tl.fma(-z, z, p))
    return x * tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(
    gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr = 1.0, LIMIT: tl.constexpr = 0.0, OFFSET: tl.constexpr = 0.0
):  # fmt: skip
    """``elementary.gated``: act(gate) * (up + OFFSET); ALPHA is silu's slope, LIMIT 0 is none."""
    if LIMIT > 0:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if OFFSET != 0:
        up = up + OFFSET
    if ACT == "silu":
        return tl.div_rn(gate, 1.0 + exponential(-(ALPHA * gate))) * up
    return _gelu(gate) * up
