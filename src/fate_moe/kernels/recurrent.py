"""Gated delta rule, to the bit: a row's result depends on the rows before it in its own sequence, not on how they were cut. In C++:
``csrc/recurrent.cpp`` and ``csrc/recurrent.inc``.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464), as Qwen3-Next has it.
"""

from __future__ import annotations

import torch

from fate_moe.kernels.elementary import exponential, fused, normalize, sigmoid, silu, sum_of_lanes
from fate_moe.kernels.plain_layer import Delta

__all__ = ["convolve", "delta_attention", "delta_rule", "empty_state", "log_one_plus", "softplus", "unit"]

State = tuple[torch.Tensor, torch.Tensor]


def log_one_plus(z: torch.Tensor) -> torch.Tensor:
    """ln(1 + z) of fp32 ``z`` >= 0: with u = 1 + z = 2^n * m, m in [0.7071, 1.4142), and s = (m - 1) / (m + 1), it is
    n * ln 2 + 2s + 2s * (s^2 / 3 + ... + s^8 / 9), and what u lost of z, over u. Relative error below 3e-7."""
    u = 1 + z
    lost = (z - (u - 1)) / u
    bits = u.view(torch.int32)
    n = (bits - 0x3F3504F3) >> 23
    m = (bits - (n << 23)).view(torch.float32)
    s = (m - 1) / (m + 1)
    w = s * s
    p = torch.full_like(z, 1 / 9)
    for coefficient in (1 / 7, 1 / 5, 1 / 3):
        p = fused(p, w, coefficient)
    return fused(n.float(), 0.693147181, fused(2 * s, w * p, 2 * s)) + lost


def softplus(x: torch.Tensor) -> torch.Tensor:
    """ln(1 + e^x), and x above 20."""
    return torch.where(x > 20, x, log_one_plus(exponential(x)))


def unit(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """(x * f) * scale of fp32 ``x`` [..., n] with f = 1 / sqrt(sum of squares + 1e-6), summed as ``mean_square`` does."""
    lanes = torch.zeros(*x.shape[:-1], 16)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16))
    for first in range(0, padded.shape[-1], 16):
        part = padded[..., first : first + 16]
        lanes = fused(part, part, lanes)
    root = (sum_of_lanes(lanes) + 1e-6).double().sqrt().float().unsqueeze(-1)
    return x * (torch.ones_like(root) / root) * scale


def convolve(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """fp32 [T, channels] of ``inputs`` fp32 [kernel - 1 + T, channels] and ``weights`` [channels, kernel]: silu of the sum of
    weight_j * input_(t + j), fused, j ascending from 0."""
    count = len(inputs) - weights.shape[1] + 1
    sums = torch.zeros(count, inputs.shape[1])
    for j in range(weights.shape[1]):
        sums = fused(weights[:, j].float(), inputs[j : j + count], sums)
    return silu(sums)


def delta_rule(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decays: torch.Tensor,
    strengths: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [T, heads, value_dim] and the new state of fp32 ``state`` [heads, key_dim, value_dim]; ``queries`` and ``keys`` [T,
    heads, key_dim], ``values`` [T, heads, value_dim], ``decays`` and ``strengths`` [T, heads]. Row by row, of a head::

        m_j = fma(k_i, S_ij * decay, m_j) over i, ascending, from 0;  d_j = (v_j - m_j) * strength
        S_ij = fma(k_i, d_j, S_ij * decay);  o_j = fma(q_i, S_ij, o_j) over i, ascending, from 0
    """
    rows = []
    for q, k, v, decay, strength in zip(queries, keys, values, decays, strengths, strict=True):
        faded = state * decay[:, None, None]
        sums = torch.zeros_like(v)
        for i in range(k.shape[1]):
            sums = fused(k[:, i : i + 1], faded[:, i], sums)
        added = (v - sums) * strength[:, None]
        state = fused(k.unsqueeze(-1), added.unsqueeze(1), faded)
        out = torch.zeros_like(v)
        for i in range(q.shape[1]):
            out = fused(q[:, i : i + 1], state[:, i], out)
        rows.append(out)
    return torch.stack(rows), state


def empty_state(delta: Delta, dtype: torch.dtype = torch.bfloat16) -> State:
    """Of no token: the last inputs of the convolution bf16 [kernel, channels], the newest last, and fp32 [heads, key_dim,
    value_dim]."""
    inputs = torch.zeros(delta.kernel, delta.channels, dtype=dtype)
    return inputs, torch.zeros(delta.value_heads, delta.key_dim, delta.value_dim)


def delta_attention(
    delta: Delta,
    raw: torch.Tensor,
    convolution: torch.Tensor,
    dt_bias: torch.Tensor,
    log_rates: torch.Tensor,
    norm: torch.Tensor,
    state: State,
) -> tuple[torch.Tensor, State]:
    """fp32 [T, heads * value_dim], what out_proj is given, and the new state, of ``raw`` fp32 [T, width], the results of
    ``delta.inputs`` one after the other; ``convolution`` [channels, kernel], ``dt_bias`` and ``log_rates`` [heads], ``norm``
    [value_dim].

    Inputs of the convolution are rounded to the dtype of the state, bf16 in the kernels.
    Queries and keys become ``unit``, queries over sqrt(key_dim). The decay is
    e^-(e^log_rate * softplus(a + dt_bias)), the strength sigmoid(b). Results are normed and multiplied by silu(z).
    """
    starts, steps = delta.places
    heads, group, count = delta.key_heads, delta.value_heads // delta.key_heads, len(raw)
    sizes = (delta.key_dim, delta.key_dim, group * delta.value_dim, group * delta.value_dim, group, group)
    q, k, v, z, b, a = (
        torch.stack([raw[:, start + h * step : start + h * step + size] for h in range(heads)], 1)
        for start, step, size in zip(starts, steps, sizes, strict=True)
    )
    inputs = torch.cat([state[0], torch.cat([part.flatten(1) for part in (q, k, v)], 1).to(state[0].dtype)]).float()
    mixed = convolve(inputs[1:], convolution)
    keys = heads * delta.key_dim
    q, k, v = mixed[:, :keys], mixed[:, keys : 2 * keys], mixed[:, 2 * keys :]
    scale = float(1 / torch.tensor(float(delta.key_dim)).double().sqrt().float())
    q, k = unit(q.reshape(count, heads, -1), scale), unit(k.reshape(count, heads, -1))
    decays = exponential(-(exponential(log_rates.float()) * softplus(a.flatten(1) + dt_bias.float())))
    found, memory = delta_rule(
        q.repeat_interleave(group, 1), k.repeat_interleave(group, 1), v.reshape(count, delta.value_heads, -1), decays,
        sigmoid(b.flatten(1)), state[1],
    )  # fmt: skip
    normed = normalize(found, norm.float(), delta.norm.eps)
    out = normed * silu(z.reshape(count, delta.value_heads, -1))
    return out.flatten(1), (inputs[-delta.kernel :].to(state[0].dtype), memory)
