"""Functions of single numbers and of rows to the bit: what every processor computes between the products of a layer.

IEEE fp32 with one rounding an operation, in the order that is written here; only the product within ``fused`` is not rounded
before its addition. NaN stands for any NaN. The same in C++ is in ``csrc/elementary.inc``, ``loops.inc`` and ``steps.inc``.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "activate",
    "bf16",
    "center",
    "combine",
    "exponential",
    "fused",
    "gated",
    "gelu",
    "gelu_tanh",
    "linear_bf16",
    "mean_square",
    "normalize",
    "position_scales",
    "sigmoid",
    "silu",
    "softmax",
    "sum_of_lanes",
    "turn",
    "turn_pairs",
]

_INVERSE_FACTORIALS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
# Of ln(erfc(z) / t) + z * z with t = 1 / (1 + z / 2): Press et al., Numerical Recipes in C, 2nd edition, 6.2 (erfcc).
_TAIL = (
    0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223,
)  # fmt: skip


def fused(a: torch.Tensor | float, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """a * b + c of fp32 tensors (broadcast; a number stands for the nearest fp32), rounded once, as the instruction does.

    The product is exact in fp64. Its sum with c is rounded to odd there (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums", 2008), so that the second rounding, to fp32, is that of the exact value.
    """
    a, b, c = (torch.as_tensor(each, dtype=torch.float32).double() for each in (a, b, c))
    product, addend = a * b, c
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # Knuth's TwoSum: exact
    toward = torch.nextafter(total, torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype))
    even = (total.view(torch.int64) & 1) == 0
    inexact = (error != 0) & error.isfinite()
    return torch.where(inexact & even, toward, total).float()


def bf16(x: torch.Tensor) -> torch.Tensor:
    """fp32 ``x`` rounded to bf16 (to nearest even), as fp32."""
    return x.bfloat16().float()


def exponential(x: torch.Tensor) -> torch.Tensor:
    """e to the power of ``x``, which is limited to -87 and 88 first. Relative error below 3e-7 within.

    2^n * p(r) with n = round(x * 1.44269504), r = x - n * ln 2 in two fused steps, and Taylor's p to the sixth power.
    """
    x = torch.where(x < -87, -87.0, torch.where(x > 88, 88.0, x))
    n = (x * 1.44269504).round()
    r = fused(n, 2.12194440e-4, fused(n, -0.693359375, x))
    p = torch.full_like(x, _INVERSE_FACTORIALS[0])
    for coefficient in _INVERSE_FACTORIALS[1:]:
        p = fused(p, r, coefficient)
    power = ((n.nan_to_num().int() + 127) << 23).view(torch.float32)
    return p * power


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x)."""
    return _one_over(1 + exponential(-x))


def silu(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """x / (1 + e^-(alpha * x))."""
    return x / (1 + exponential(-(alpha * x)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x * (1 + tanh u) / 2 = x / (1 + e^(-2u)) with u = 0.7978845608 * (x + 0.044715 * x^3)."""
    u = 0.7978845608 * (x + ((0.044715 * x) * x) * x)
    return x / (1 + exponential(-2 * u))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x * (1 + erf(x / sqrt 2)) / 2. Error against fp64: below 4e-7 times |x|, and below 2e-5 of the result for x > -13.

    erfc(z) = t * e^(-z^2 + p(t)), t = 1 / (1 + z / 2), for z = |x| / sqrt 2.
    """
    z = x.abs() * 0.70710678
    t = _one_over(fused(0.5, z, 1.0))
    p = torch.full_like(x, _TAIL[0])
    for coefficient in _TAIL[1:]:
        p = fused(p, t, coefficient)
    tail = (0.5 * t) * exponential(fused(-z, z, p))
    return x * torch.where(x < 0, tail, 1 - tail)


def activate(x: torch.Tensor, activation: str, alpha: float = 1.0) -> torch.Tensor:
    """``activation`` (by transformers' name) of fp32 ``x``; ``alpha`` is silu's slope."""
    if activation == "silu":
        return silu(x, alpha)
    if activation == "gelu":
        return gelu(x)
    if activation == "gelu_pytorch_tanh":
        return gelu_tanh(x)
    positive = torch.where(x < 0, 0.0, x)
    return {"relu": positive, "relu2": positive * positive}[activation]


def gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    alpha: float = 1.0,
    limit: float = math.inf,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """activation(min(gate, limit)) * (up within plus and minus limit + up_offset), fp32."""
    gate = torch.where(gate > limit, limit, gate)
    up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return activate(gate, activation, alpha) * (up + up_offset)


def combine(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, n] of ``rows`` [T, k, n] times ``weights`` [T, k], fp32: y = 0, then y = fma(weight, row, y) in routing order."""
    y = torch.zeros(len(rows), rows.shape[2])
    for j in range(rows.shape[1]):
        y = fused(weights[:, j : j + 1], rows[:, j], y)
    return y


def sum_of_lanes(lanes: torch.Tensor) -> torch.Tensor:
    """[...] of ``lanes`` [..., 16]: lane i + lane i + 8, then + 4, + 2, + 1."""
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """[..., 1] of fp32 ``x`` [..., n]: lane i sums i, i + 16, ... with fma from 0, then ``sum_of_lanes``, divided by n."""
    lanes = torch.zeros(*x.shape[:-1], 16)
    for part in _by_lanes(x):
        lanes = fused(part, part, lanes)
    return (sum_of_lanes(lanes) / x.shape[-1]).unsqueeze(-1)


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float, rounds: bool = False) -> torch.Tensor:
    """RMS norm of fp32 ``x`` [..., n]: (x * f) * weight, f = 1 / sqrt(mean square + eps). ``rounds``: x * f is rounded to bf16."""
    y = x * _one_over((mean_square(x) + eps).double().sqrt().float())  # torch's fp32 root may be a unit off
    return (bf16(y) if rounds else y) * weight


def center(x: torch.Tensor) -> torch.Tensor:
    """fp32 ``x`` [..., n] less its mean: lane i sums i, i + 16, ... by additions from 0, then ``sum_of_lanes``, divided by n."""
    lanes = torch.zeros(*x.shape[:-1], 16)
    for part in _by_lanes(x):
        lanes = lanes + part
    return x - (sum_of_lanes(lanes) / x.shape[-1]).unsqueeze(-1)


def linear_bf16(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 [T, R] of ``x`` fp32 [T, C] times ``weight`` bf16 or fp32 [R, C], the same for any number of rows of x.

    Lane i sums columns i, i + 16, ... with fma from 0, then ``sum_of_lanes``, then the ``bias`` is added.
    """
    lanes = torch.zeros(len(x), len(weight), 16)
    for numbers, part in zip(_by_lanes(weight.float()), _by_lanes(x), strict=True):
        lanes = fused(numbers, part.unsqueeze(1), lanes)
    summed = sum_of_lanes(lanes)
    return summed if bias is None else summed + bias.float()


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension of fp32 ``x`` [..., n]: e = exponential(x - maximum), divided by their sum.

    The maximum passes over NaN. Lane i sums i, i + 16, ... by additions from 0, then ``sum_of_lanes``.
    """
    most = torch.where(x.isnan(), -torch.inf, x).amax(-1, keepdim=True)
    e = exponential(x - most)
    lanes = torch.zeros(*x.shape[:-1], 16)
    for part in _by_lanes(e):
        lanes = lanes + part
    return e / sum_of_lanes(lanes).unsqueeze(-1)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary halves of fp32 ``x`` [T, heads, head_dim] by ``cos`` and ``sin`` [T, n]: channels i and i + n / 2 turn together, those
    from n on stay. x_i * cos_i - x_(i + n/2) * sin_i, and x_(i + n/2) * cos_(i + n/2) + x_i * sin_(i + n/2): no fma."""
    half = cos.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    low = first * cos[..., :half] - second * sin[..., :half]
    high = second * cos[..., half:] + first * sin[..., half:]
    return torch.cat([low, high, rest], dim=-1)


def turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, parts: bool) -> torch.Tensor:
    """As ``turn``, where channels 2i and 2i + 1 of the first n turn together, by cos_i and sin_i. ``parts``: to i and i + n / 2."""
    n = cos.shape[-1]
    cos, sin = cos[:, : n // 2].unsqueeze(1), sin[:, : n // 2].unsqueeze(1)
    first, second = x[..., :n:2], x[..., 1:n:2]
    low, high = first * cos - second * sin, second * cos + first * sin
    turned = torch.cat([low, high], dim=-1) if parts else torch.stack([low, high], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., n:]], dim=-1)


def position_scales(slope: float) -> torch.Tensor:
    """fp32 [n]: 1 + slope * ln(1 + i), what queries are multiplied by that come i times an attention's ``scale_every`` positions
    late; the last stands for those behind, which no text reaches."""
    return 1 + slope * torch.log(1 + torch.arange(4096).float())


def _one_over(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x) / x  # 1.0 / x may become an estimate with a correction


def _by_lanes(x: torch.Tensor) -> list[torch.Tensor]:
    """``x`` [..., n] in pieces of [..., 16], the last filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16))
    return [padded[..., first : first + 16] for first in range(0, padded.shape[-1], 16)]
