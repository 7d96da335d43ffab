"""Attention with its KV cache, run by one call of the extension, for one token or many (``modules.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from fate_moe.adapter.kv_cache import make_room, room_for
from fate_moe.kernels.elementary import exponential, position_scales
from fate_moe.kernels.native import BF16, DTYPES, MOST_TURNED, ROPES, native
from fate_moe.kernels.plain_layer import Attention, Delta
from fate_moe.layers.dense import QuantizedLinear
from fate_moe.layers.rows import batch_rows, contiguous_kv, padding_of
from fate_moe.layers.snapshot import ModuleSnapshot, StandIn
from fate_moe.layers.weights import MOST_FEW, difference_of, is_near, native_norm, takes_many, warn_of_difference, weight_of

__all__ = [
    "accelerated_attention",
    "angles_for",
    "cos_and_sin",
    "embeddings_of",
    "mask_for",
    "native_attention",
    "projections_of",
    "takes_tokens",
    "way_of",
]

_PROBE_TOKENS = 6
_MOST_SPREAD = 4.0  # standard deviation of a query's scores in a trial

Forward = Callable[..., Any]


def seen_tokens(past: int, count: int, window: int | None) -> torch.Tensor:
    """bool [count, past + count]: which of all tokens each of the last ``count`` sees."""
    seen = torch.ones(count, past + count, dtype=torch.bool).tril(past)
    return seen.triu(past + 1 - window) if window else seen


def _as_numbers(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def mask_for(attention: Attention, past: int, count: int) -> torch.Tensor:
    """What the family's own forward is given with ``count`` tokens behind ``past`` others, in bf16."""
    seen = seen_tokens(past, count, attention.window)[None, None]
    return _as_numbers(seen, torch.bfloat16) if way_of(attention) == "eager" else seen


def way_of(attention: Attention) -> str:
    """The implementation of attention that the family's own forward has to run where ours stands in for it."""
    return "eager" if attention.sinks else "sdpa"


class _Attention(StandIn):
    def __init__(self, module: Any, of: Any, attention: Attention, exact: bool, many: bool) -> None:
        self.original, self.of, self._config = module.forward, of, module.config
        self._attention, self._exact, self._many = attention, exact, many
        self._snapshot = ModuleSnapshot([module])

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x, attention = hidden_states, self._attention
        angles = angles_for(attention, x, kwargs)
        if (
            angles is None
            or args
            or kwargs.get("output_attentions")
            or not takes_tokens(x, angles, attention, self._many)
            or self._snapshot.hooked()
            or not self._snapshot.same()
        ):
            return self.original(hidden_states, *args, **kwargs)
        batch, count, _ = x.shape
        room = room_for(kwargs.get("past_key_values"), attention.index, attention.kv_heads, attention.cached_dims, batch)
        past = room.get_seq_length() if room is not None else 0
        padding = padding_of(kwargs.get("attention_mask"), batch, count, past, attention.window) if room is not None else None
        rows = batch_rows(batch, count, past, padding) if padding is not None else None
        if rows is None or room is None:
            return self.original(hidden_states, *args, **kwargs)
        kv = native.Kv.make(*contiguous_kv(*room.reserve(count)[1:]))
        hidden, cos, sin = rows.pick(x), rows.pick(angles[0]).float(), rows.pick(angles[1]).float()
        out = torch.empty_like(hidden)
        native.attention(
            self.of, hidden.data_ptr(), 1, rows.spans, cos.data_ptr(), sin.data_ptr(), kv, out.data_ptr(), self._exact,
            torch.get_num_threads(),
        )  # fmt: skip
        room.extend(count)
        return rows.put(out), None


def takes_tokens(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], attention: Attention, many: bool) -> bool:
    """Whether ``x`` [batch, tokens, hidden] is bf16 with ``angles``, and unless ``many`` may come of ``MOST_FEW`` rows at most."""
    return (
        x.dim() == 3
        and (many or x.shape[0] * x.shape[1] <= MOST_FEW)
        and x.dtype == torch.bfloat16
        and not x.requires_grad
        and angles[0].dtype in (torch.bfloat16, torch.float32)
        and angles[0].shape[1:] == (x.shape[1], attention.num_angles)
        and len(angles[0]) in (1, len(x))
    )


def angles_for(attention: Attention, x: torch.Tensor, kwargs: Mapping[str, Any]) -> Any:
    """cos and sin that a call with ``x`` [batch, tokens, hidden] has; of no columns where nothing turns."""
    if attention.num_angles:
        return cos_and_sin(kwargs.get("position_embeddings"))
    nothing = x.new_zeros(1, x.shape[1] if x.dim() == 3 else 0, 0)
    return nothing, nothing


def cos_and_sin(embeddings: Any) -> Any:
    """Of what a family's rotary embedding gives: a tuple, or one complex tensor."""
    return (embeddings.real, embeddings.imag) if isinstance(embeddings, torch.Tensor) and embeddings.is_complex() else embeddings


def embeddings_of(attention: Attention, angles: torch.Tensor) -> Any:
    """What a family's attention is given for ``angles`` fp32 [1, T, rotary_dim / 2], in bf16 where that is real."""
    if not attention.rotary_dim and not attention.angles_unused:
        return None
    if attention.complex_angles:
        return torch.polar(torch.ones_like(angles), angles)
    angles = angles.repeat(1, 1, 1 if attention.half_angles else 2)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def native_attention(module: Any, attention: Attention) -> Any:
    """The extension's Attention of ``module``; None if there is no kernel for a part of it."""
    if attention.delta is not None:
        return _native_delta(module, attention, attention.delta)
    weights = [weight_of(part) for part in projections_of(module)]
    apart = attention.qk_norm is not None and attention.latent is None
    norms = [getattr(module, name) for name in attention.norm_names] if apart else []
    latent = attention.latent
    if latent is not None:
        norms = [module.q_a_layernorm if latent.two_steps else module.kv_a_layernorm, module.kv_a_layernorm]
    if any(weight is None for weight in weights) or any(norm.weight.dtype not in DTYPES for norm in norms):
        return None
    sinks = module.sinks if attention.sinks else None
    rest = None
    if latent is not None:
        *first, q, kv_a, kv_b, out = weights
        none = native.Weight.make(native.Place.make(BF16, 0, 64, [0], 0, 0, -1, 0), 0, 0, 0)
        rest = native.Latent.make(first[0] if first else none, kv_a, kv_b, latent.nope, latent.value_dim)
        weights = [q, none, none, out]
    return native.Attention.make(
        *weights, attention.heads, attention.kv_heads, attention.head_dim, attention.rotary_dim, attention.num_angles,
        ROPES.index(attention.rope), attention.scaling, *(native_norm(norm, attention.qk_norm) for norm in norms or (None, None)),
        attention.norm_over_heads, attention.clip or 0.0, attention.window or 0,
        *((sinks.data_ptr(), DTYPES[sinks.dtype]) if sinks is not None else (0, 0)), rest, attention.norm_after_rope,
        attention.gated, position_scales(attention.scale_slope).tolist() if attention.scale_every else [],
        max(1, attention.scale_every),
    )  # fmt: skip


def _native_delta(module: Any, attention: Attention, delta: Delta) -> Any:
    *parts, last = projections_of(module)
    weights, out = [weight_of(part) for part in parts], weight_of(last)
    small = [module.conv1d.weight, module.dt_bias, module.A_log]
    if out is None or any(weight is None for weight in weights) or module.norm.weight.dtype not in DTYPES:
        return None
    if len({part.kind for part in parts if isinstance(part, QuantizedLinear)}) > 1:
        return None  # inputs are rounded once, for one kind of matrix
    convolution, biases, rates = (part.detach().float() for part in small)
    made = native.Delta.make(
        weights, delta.key_heads, delta.value_heads, delta.key_dim, delta.value_dim, delta.kernel, *delta.places,
        convolution[:, 0].T.flatten().tolist(), biases.tolist(), exponential(rates).tolist(), native_norm(module.norm, delta.norm),
    )  # fmt: skip
    none = native.Weight.make(native.Place.make(BF16, 0, 64, [0], 0, 0, -1, 0), 0, 0, 0)
    nothing = native_norm(None, None)
    return native.Attention.make(
        none, none, none, out, attention.heads, attention.kv_heads, attention.head_dim, 0, 0, 0, 1.0, nothing, nothing, False, 0.0,
        0, 0, 0, None, delta=made,
    )  # fmt: skip


def projections_of(module: Any) -> list[Any]:
    """The linear layers of an attention, in the order in which ``native_attention`` takes them."""
    if hasattr(module, "conv1d"):
        combined = (
            ["in_proj_qkvz", "in_proj_ba"] if hasattr(module, "in_proj_ba") else [f"in_proj_{x}" for x in ("qkv", "z", "b", "a")]
        )
        return [getattr(module, name) for name in (*combined, "out_proj")]
    if not hasattr(module, "kv_b_proj"):
        return [module.q_proj, module.k_proj, module.v_proj, module.o_proj]
    queries = [module.q_proj] if getattr(module, "q_lora_rank", None) is None else [module.q_a_proj, module.q_b_proj]
    return [*queries, module.kv_a_proj_with_mqa, module.kv_b_proj, module.o_proj]


def accelerated_attention(name: str, module: Any, attention: Attention, exact: bool, generator: torch.Generator) -> StandIn | None:
    """What runs ``module`` by the extension; None if there is no kernel, or it gives something else (a warning says so)."""
    way = getattr(module.config, "_attn_implementation", "")
    if way != way_of(attention) or attention.index < 0 or attention.rotary_dim > MOST_TURNED:
        return None
    of = native_attention(module, attention)
    if of is None:
        return None
    forward = _Attention(module, of, attention, exact, takes_many(projections_of(module), exact))
    try:
        x = _probe_inputs(module, attention, generator)
        difference = _attention_difference(forward.original, forward, x, attention, generator)
    except Exception as error:  # whatever a family's attention makes of this call
        difference = f"it cannot be called with a token and a cache ({error})"
    if difference is not None:
        warn_of_difference(name, difference)
        return None
    return forward


def _probe_inputs(module: Any, attention: Attention, generator: torch.Generator) -> torch.Tensor:
    """[1, _PROBE_TOKENS, hidden] of bf16, such that scores differ enough to show another rope or scaling, and not so much that a
    softmax makes roundings of bf16 large."""
    x = (2 * torch.randn(1, _PROBE_TOKENS, module.o_proj.out_features, generator=generator)).bfloat16()
    if attention.qk_norm is not None:
        return x  # scores do not depend on the size of x
    queries, keys = (part(x)[0].float().view(_PROBE_TOKENS, -1, attention.head_dim) for part in (module.q_proj, module.k_proj))
    keys = keys.repeat_interleave(attention.heads // attention.kv_heads, 1)
    spread = float((torch.einsum("thd,shd->hts", queries, keys) * attention.scaling).std(-1).max())
    return x * min(1.0, math.sqrt(_MOST_SPREAD / max(spread, 1e-30)))


def _attention_difference(
    original: Forward, forward: Forward, x: torch.Tensor, attention: Attention, generator: torch.Generator
) -> str | None:
    """Several tokens of ``x`` by the family's own forward, then the last by each of the two: how output, key or value
    differ, if they do."""
    angles = 3 * torch.rand(1, _PROBE_TOKENS, attention.rotary_dim // 2, generator=generator)
    results = []
    for attend in (original, forward):
        cache = DynamicCache()
        for step in (slice(None, -1), slice(-1, None)):
            embeddings = embeddings_of(attention, angles[:, step])
            function = original if step.start is None else attend
            hidden = x[:, step].contiguous()
            past = step.start % _PROBE_TOKENS if step.start else 0
            mask = mask_for(attention, past, hidden.shape[1])
            positions = torch.arange(past, past + hidden.shape[1])[None]
            out = function(
                hidden, position_embeddings=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache
            )[0]
            make_room(cache, _PROBE_TOKENS)
        layer = cache.layers[attention.index]
        results.append((out, layer.keys[:, :, -1:], layer.values[:, :, -1:]))
    return next((difference_of(got, want) for want, got in zip(*results, strict=True) if not is_near(got, want)), None)
