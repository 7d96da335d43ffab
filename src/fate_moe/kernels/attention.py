"""Attention of query rows over a KV cache, to the bit: a row's result depends on its own position and on keys and values up to it,
not on how many rows are computed together or how a prompt was cut. In C++: ``csrc/attend.inc``."""

from __future__ import annotations

import torch

from fate_moe.kernels.elementary import exponential, fused, linear_bf16, sum_of_lanes
from fate_moe.kernels.reference import quantize_activations

__all__ = ["POSITIONS", "SCALED", "attend", "attend_latent", "dequantized", "quantized", "row_width", "soften"]

POSITIONS = 64  # of a block; blocks begin at multiples of it
SCALED = 64  # channels of a position and head that share a scale in an int8 cache


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [T, heads, d] of ``queries`` fp32 [T, heads, d], the last T positions of ``keys`` and ``values`` [S, kv heads, d], which
    are bf16 or as ``quantized`` gives them.

    A row sees positions up to its own, with a ``window`` only so many. Positions go in blocks of 64, ascending. In a block::

        s_j = scaling * (q . k_j), where the product is fma(q_c, k_jc, .) over channels c, ascending, from 0
        m' = max(m, all s_j), passing over NaN;  f = exponential(m - m');  p_j = exponential(s_j - m')
        l = fma(l, f, P), where lane i of 16 adds p_i, p_i+16, p_i+32, p_i+48 and P adds the lanes (``sum_of_lanes``)
        o_c = o_c * f, then fma(p_j, v_jc, o_c) over the visible positions j, ascending

    and the result is o / l. At first m is -infinity, l and o are 0; with ``sinks`` fp32 [heads] m is the head's sink and l is 1.
    With a ``cap`` s_j becomes ``soften(s_j, cap)``.

    Of an int8 cache k_jc and v_jc are codes, and each group g of channels has scales a_jg of keys and b_jg of values::

        q . k_j = fma(a_jg, D_jg, .) over groups g, ascending, from 0, with D_jg = fma(q_c, k_jc, .) over g's channels, from 0
        o_c = o_c * f, then fma(p_j * b_jg, v_jc, o_c)
    """
    num_tokens, heads, dim = queries.shape
    group = heads // keys.shape[1]
    scales = [torch.ones(()), torch.ones(())]
    if keys.dtype == torch.uint8:
        found = [_codes(states, dim) for states in (keys, values)]
        (keys, values), scales = [codes for codes, _ in found], [of.repeat_interleave(group, 1).transpose(0, 1) for _, of in found]
    keys, values = (states.float().repeat_interleave(group, 1).transpose(0, 1) for states in (keys, values))  # [heads, S, d]
    first = keys.shape[1] - num_tokens
    most = torch.full((num_tokens, heads), -torch.inf) if sinks is None else sinks.float().expand(num_tokens, heads)
    total = torch.full((num_tokens, heads), 0.0 if sinks is None else 1.0)
    out = torch.zeros_like(queries)
    row_at = torch.arange(first, first + num_tokens).view(-1, 1, 1)
    for begin in range(0, keys.shape[1], POSITIONS):
        block = slice(begin, begin + POSITIONS)
        at = torch.arange(begin, min(begin + POSITIONS, keys.shape[1]))
        seen = (at <= row_at) & (at > row_at - (window or keys.shape[1]))  # [T, 1, n]
        scores = torch.zeros(num_tokens, heads, len(at))
        for some in range(0, dim, SCALED):
            products = torch.zeros_like(scores) if scales[0].dim() else scores
            for channel in range(some, min(some + SCALED, dim)):
                products = fused(queries[:, :, channel : channel + 1], keys[:, block, channel], products)
            scores = fused(scales[0][:, block, some // SCALED], products, scores) if scales[0].dim() else products
        scores = scores * scaling
        if cap:
            scores = soften(scores, cap)
        largest = torch.where(seen & ~scores.isnan(), scores, -torch.inf).amax(-1)
        new_most = torch.where(largest > most, largest, most)
        factor = exponential(most - new_most)
        weights = torch.where(seen, exponential(scores - new_most.unsqueeze(-1)), 0.0)
        lanes = torch.nn.functional.pad(weights, (0, POSITIONS - len(at))).view(num_tokens, heads, POSITIONS // 16, 16)
        added = lanes[:, :, 0] + lanes[:, :, 1] + lanes[:, :, 2] + lanes[:, :, 3]
        sums = out * factor.unsqueeze(-1)
        for j in range(len(at)):
            weight = weights[:, :, j : j + 1]
            if scales[1].dim():
                weight = (weight * scales[1][:, begin + j]).repeat_interleave(SCALED, -1)[..., :dim]
            next_sums = fused(weight, values[:, begin + j], sums)
            sums = torch.where(seen[:, :, j : j + 1], next_sums, sums)
        visited = seen.any(-1)  # [T, 1]
        total = torch.where(visited, fused(total, factor, sum_of_lanes(added)), total)
        most = torch.where(visited, new_most, most)
        out = torch.where(visited.unsqueeze(-1), sums, out)
    return out / total.unsqueeze(-1)


def row_width(kv_format: str, n: int) -> int:
    """What a position's keys or values of one head, ``n`` channels, take in the KV cache: numbers of bf16, or bytes of int8."""
    return n if kv_format == "bf16" else n + 4 * -(-n // SCALED)


def quantized(states: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n + 4 * ceil(n / 64)] of ``states`` [..., n]: rows of an int8 KV cache, each by itself, so that what is appended
    later changes none.

    A row is rounded to bf16 and quantized by ``quantize_activations`` in groups of 64 channels: n codes in int8, then the groups'
    scales in fp32.
    """
    n = states.shape[-1]
    codes, scales = quantize_activations(states.bfloat16().float().reshape(-1, n), SCALED)
    parts = codes.flatten(1)[:, :n].to(torch.int8).view(torch.uint8), scales.contiguous().view(torch.uint8)
    return torch.cat(parts, -1).view(*states.shape[:-1], -1)


def _codes(rows: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., n] and scales [..., groups] of ``rows`` of ``n`` numbers as ``quantized`` gives them."""
    return rows[..., :n].view(torch.int8), rows[..., n:].contiguous().view(torch.float32)


def dequantized(rows: torch.Tensor, n: int) -> torch.Tensor:
    """bf16 [..., n] that ``rows`` of ``n`` numbers stand for, for who reads a cache in another way than ``attend``."""
    codes, scales = _codes(rows, n)
    return (codes * scales.repeat_interleave(SCALED, -1)[..., :n]).bfloat16()


def attend_latent(queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, *, nope: int, scaling: float) -> torch.Tensor:
    """fp32 [T, heads, v] of ``queries`` fp32 [T, heads, nope + rope], whose last channels are turned, the last T positions of
    ``keys`` [S, rank + rope], bf16 or as ``quantized`` gives them, a latent row and what turns, which all heads share.

    ``weights`` fp32 [heads, nope + v, rank] makes keys and values of latent rows. Queries go to the latent rows instead:
    q_c = fma(q_i, w_ic, q_c) over channels i < nope, ascending, from 0; then their turned channels. ``attend`` gives each head's
    sum of latent rows, and ``linear_bf16`` with the head's last v rows what comes out.
    """
    num_tokens, heads, _ = queries.shape
    absorbed = torch.zeros(num_tokens, heads, weights.shape[2])
    for i in range(nope):
        absorbed = fused(queries[:, :, i : i + 1], weights[:, i], absorbed)
    shared = keys.unsqueeze(1)
    summed = attend(torch.cat([absorbed, queries[:, :, nope:]], dim=-1), shared, shared, scaling=scaling)[..., : weights.shape[2]]
    return torch.stack([linear_bf16(summed[:, head], weights[head, nope:]) for head in range(heads)], dim=1)


def soften(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(s / cap) with tanh(u) = 1 - 2 / (1 + e^(2u))."""
    raised = 1 + exponential(2 * (scores / cap))
    return cap * (1 - torch.full_like(raised, 2) / raised)
