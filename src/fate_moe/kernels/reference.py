"""The plain torch twin of every kernel: slow where a kernel exists, and the definition of what a kernel computes.

Activations, norms, softmax, routing and weighted sums are in ``elementary.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear, pad

from fate_moe.core import BlobLayout
from fate_moe.kernels import elementary, recurrent
from fate_moe.kernels.elementary import fused, position_scales
from fate_moe.kernels.plain_layer import Attention, Latent, Mlp, Norm, PlainLayer
from fate_moe.kernels.routing import route
from fate_moe.quant.planes import unpack

__all__ = [
    "decoder_layer",
    "dequantize",
    "expert_mlp",
    "expert_weights",
    "fused",
    "linear_quantized",
    "norm",
    "quantize_activations",
    "quantized_experts",
]

Weights = Mapping[str, torch.Tensor]
# (hidden [T, H], expert indices [T, top_k], their weights [T, top_k]) -> [T, H], as transformers calls its experts.
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dequantize(
    planes: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    *,
    cols: int,
    group_size: int,
    widths: tuple[int, ...],
    num_planes: int | None = None,
) -> torch.Tensor:
    """The matrix [R, cols] in fp32 of a progressive-INT4 part: w = scale * q - zero, group by group (design: planes 2+1+1).

    ``planes[i]`` is U8 [R, G, group_size * widths[i] / 8], ``scale`` and ``zero`` are F16 [R, G]. With ``num_planes`` fewer than
    stored, a truncated code stands for the middle of its bin: the 2-bit view of 4-bit codes adds 1.5, the 3-bit view 0.5.
    """
    used = len(widths) if num_planes is None else num_planes
    codes = unpack(planes[:used], widths, group_size, used).float()  # [R, G * group_size], missing low bits zero
    codes += (2 ** sum(widths[used:]) - 1) / 2
    rows, groups = scale.shape
    grouped = codes.view(rows, groups, group_size)
    return (grouped * scale.float().unsqueeze(-1) - zero.float().unsqueeze(-1)).view(rows, -1)[:, :cols]


def quantize_activations(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 activations: codes [T, G, group_size] (as fp32) and scale [T, G] with x ~ scale * code, from ``x`` fp32 [T, C].

    scale = amax / 127 of each group, codes are rounded to nearest even; columns beyond C count as zeros. A group that is not finite
    everywhere has scale NaN.
    """
    cols = x.shape[1]
    grouped = pad(x, (0, -cols % group_size)).view(len(x), -1, group_size)
    amax = grouped.abs().amax(2)
    finite = amax.isfinite()
    inverse = torch.where(finite & (amax >= 1e-30), torch.full_like(amax, 127) / amax, 0.0)  # 127 / amax would round twice
    codes = torch.where(finite.unsqueeze(2), grouped * inverse.unsqueeze(2), 0.0).round()
    return codes, torch.where(finite, amax / 127, torch.nan)


def linear_quantized(
    x: torch.Tensor,
    planes: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    *,
    group_size: int,
    widths: tuple[int, ...],
    num_planes: int | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """``x`` fp32 [T, C] times a quantized matrix [R, C] (see ``dequantize``): fp32 [T, R].

    x is rounded to int8 first, in the weights' groups: x ~ sx * xq. Then, with the exact integer sum D = q . xq of a group, and
    groups in ascending order::

        w = fma(scale, D, (scale * middle - zero) * sum(xq))
        y = fma(sx, w, y)

    Every kernel gives these bits, for any number of rows of x. With ``exact`` (x as it is) sums are taken in another order by each
    instruction set, and this is the definition within their error.
    """
    used = len(widths) if num_planes is None else num_planes
    rows, groups = scale.shape
    codes = unpack(planes[:used], widths, group_size, used).view(rows, groups, group_size).float()
    middle = (2 ** sum(widths[used:]) - 1) / 2
    offset = scale.float() * middle - zero.float()
    if exact:
        q = pad(x, (0, -x.shape[1] % group_size)).view(len(x), groups, group_size)
        products = torch.einsum("rgk,tgk->trg", codes, q)
        return (scale.float() * products).sum(2) + q.sum(2) @ offset.T  # type: ignore[no-any-return]
    q, sx = quantize_activations(x, group_size)
    products = torch.einsum("rgk,tgk->trg", codes, q)  # of integers: at most 128 * 255 * 127, exact in fp32
    sums = q.sum(2).unsqueeze(1)
    w = fused(scale.float(), products, offset * sums)  # [T, R, G]
    y = torch.zeros(len(x), rows)
    for group in range(groups):
        y = fused(sx[:, group].unsqueeze(1), w[:, :, group], y)
    return y


def expert_weights(
    layout: BlobLayout,
    parts: dict[str, torch.Tensor],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    num_planes: int | None = None,
) -> dict[str, torch.Tensor]:
    """One expert's parameters by name, each [out, in] (biases [out]) in ``dtype``, from the views ``parts`` of its slot.

    Without conversion these are the slot's own bytes; quantized matrices and other dtypes are made anew, and forgotten after use.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name in parts:
            weights[name] = parts[name].to(dtype)
            continue
        planes = [parts[f"{name}.plane{i}"] for i in range(len(layout.plane_widths))]
        weights[name] = dequantize(
            planes,
            parts[f"{name}.scale"],
            parts[f"{name}.zero"],
            cols=shape[1],
            group_size=layout.group_size,
            widths=layout.plane_widths,
            num_planes=num_planes,
        ).to(dtype)
    return weights


def expert_mlp(experts: Any, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert's output [num_tokens, hidden] for its tokens ``x`` [num_tokens, hidden], before the routing weight.

    ``experts`` is the transformers module: its flags and its ``_apply_gate`` say how the family combines gate and up.
    """
    if experts.has_gate:
        inner = experts._apply_gate(linear(x, weights["gate_up_proj"], weights.get("gate_up_proj_bias")))
    else:
        inner = experts.act_fn(linear(x, weights["up_proj"], weights.get("up_proj_bias")))
    out = linear(inner, weights["down_proj"], weights.get("down_proj_bias"))
    return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out  # type: ignore[no-any-return]


def quantized_experts(
    layout: BlobLayout,
    parts: Callable[[int], Mapping[str, torch.Tensor]],
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    num_planes: int | None = None,
    activation: str = "silu",
    mixed: bool = False,
    **gate: float,
) -> torch.Tensor:
    """[T, H] of ``hidden`` [T, H] through its experts ``index`` [T, top_k], summed with ``weights`` [T, top_k]; in its dtype.

    ``parts`` gives an expert's gate_up_proj and down_proj as they lie in a slot of ``layout``, perhaps with biases, which are added
    to whole sums. ``mixed``: gate and up rows take turns; ``gate`` is ``elementary.gated``'s. Every kernel gives these bits.
    """

    def product(of: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        planes = [of[f"{name}.plane{i}"] for i in range(len(layout.plane_widths))]
        y = linear_quantized(
            x, planes, of[f"{name}.scale"], of[f"{name}.zero"], group_size=layout.group_size, widths=layout.plane_widths,
            num_planes=num_planes,
        )  # fmt: skip
        return y + of[f"{name}_bias"].float() if f"{name}_bias" in of else y

    rows = torch.zeros(*index.shape, hidden.shape[1])
    for expert in sorted(set(index.flatten().tolist())):
        of = parts(expert)
        token, choice = (index == expert).nonzero(as_tuple=True)
        both = product(of, "gate_up_proj", hidden[token].float())
        first, up = (both[:, ::2], both[:, 1::2]) if mixed else both.chunk(2, dim=-1)
        rows[token, choice] = product(of, "down_proj", elementary.gated(first, up, activation, **gate))
    return elementary.combine(rows, weights.float()).to(hidden.dtype)


def decoder_layer(
    plain: PlainLayer,
    weights: Weights,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    experts: Experts | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a plain decoder layer computes: out [T, H] of ``x`` [T, H], and the keys and values [past + T, kv heads, head_dim].

    ``weights`` has the layer's parameters by the names that transformers' module gives them; ``cos`` and ``sin`` [T, num_angles]
    belong to the new tokens, ``keys`` and ``values`` [past, kv heads, head_dim] to those before. Results of matrices are rounded to
    x's dtype; norms, softmax and attention are computed in fp32.
    """
    normed = norm(plain.input_norm, weights, "input_layernorm", x)
    mix = _attention if plain.attention.delta is None else _delta_attention
    attended, keys, values = mix(plain.attention, weights, normed, cos, sin, keys, values)
    x = x + attended * plain.residual_scale
    normed = norm(plain.post_norm, weights, "post_attention_layernorm", x)
    out = torch.zeros_like(x)
    if experts is not None and not plain.is_dense:
        out = experts(normed, *_route(plain, weights, normed))
    if plain.shared is not None:
        name = plain.shared.name if plain.shared.of_layer else f"{plain.block}.{plain.shared.name}".removesuffix(".")
        beside = _mlp(plain.shared.mlp, weights, name, normed)
        if plain.shared.gate is not None:
            beside = linear(normed, weights[f"{plain.block}.{plain.shared.gate}.weight"]).sigmoid() * beside
        out = out + beside
    if plain.block_norm is not None:
        out = norm(plain.block_norm[1], weights, f"{plain.block}.{plain.block_norm[0]}", out)
    return x + out * plain.residual_scale, keys, values


def norm(of: Norm, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """[..., n] in x's dtype of ``x`` [..., n]: over the last dimension, computed in fp32."""
    y, weight = x.float(), weights[f"{name}.weight"]
    if of.centered:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + of.eps)
    if of.rounds_first:
        return (weight + of.offset) * y.to(x.dtype)
    y = (weight.float() + of.offset) * y
    return (y + weights[f"{name}.bias"].float() if of.bias else y).to(x.dtype)


def _attention(
    attention: Attention,
    weights: Weights,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, weights[f"self_attn.{name}_proj.weight"], weights.get(f"self_attn.{name}_proj.bias"))

    if attention.latent is not None:
        return _latent_attention(attention, attention.latent, weights, project, x, cos, sin, keys, values)

    gate = torch.ones(0)

    def heads(name: str) -> torch.Tensor:
        nonlocal gate
        y = project(name, x)
        normed = attention.qk_norm if name != "v" else None
        norm_name = f"self_attn.{attention.norm_names[name == 'k']}"
        if name == "q" and attention.gated:
            y, gate = (part.flatten(1) for part in y.view(len(x), attention.heads, -1).chunk(2, dim=-1))
        if normed is not None and attention.norm_over_heads:
            y = norm(normed, weights, norm_name, y)
        if attention.clip is not None:
            y = y.clamp(-attention.clip, attention.clip)
        y = y.view(len(x), -1, attention.head_dim)
        by_head = normed if not attention.norm_over_heads else None
        if by_head is not None and not attention.norm_after_rope:
            y = norm(by_head, weights, norm_name, y)
        if name != "v" and attention.rotary_dim:
            y = _rotate(y, cos, sin, attention)
        return norm(by_head, weights, norm_name, y) if by_head is not None and attention.norm_after_rope else y

    queries = _scaled(attention, heads("q"), len(keys))
    keys, values = torch.cat([keys, heads("k")]), torch.cat([values, heads("v")])
    group = attention.heads // attention.kv_heads
    scores = torch.einsum("thd,shd->hts", queries.float(), keys.repeat_interleave(group, 1).float()) * attention.scaling
    at = torch.arange(len(keys) - len(x), len(keys)).unsqueeze(1)
    seen = torch.arange(len(keys)).unsqueeze(0) <= at
    if attention.window is not None:
        seen &= torch.arange(len(keys)).unsqueeze(0) > at - attention.window
    scores = scores.masked_fill(~seen, -torch.inf)
    if attention.sinks:
        sinks = weights["self_attn.sinks"].float().view(-1, 1, 1).expand(-1, len(x), 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probabilities = scores.softmax(-1)[..., : len(keys)]
    mixed = torch.einsum("hts,shd->thd", probabilities, values.repeat_interleave(group, 1).float()).flatten(1).to(x.dtype)
    return project("o", mixed * gate.sigmoid() if attention.gated else mixed), keys, values


def _delta_attention(
    attention: Attention,
    weights: Weights,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inputs: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``inputs`` [1, kernel, channels] and ``state`` [heads, key_dim, value_dim] are what ``recurrent.empty_state`` has."""
    delta = attention.delta
    assert delta is not None
    own = {name: weights[f"linear_attn.{name}"] for name in ("conv1d.weight", "dt_bias", "A_log", "norm.weight")}
    raw = torch.cat([linear(x, weights[f"linear_attn.{name}.weight"]) for name in delta.inputs], dim=1).float()
    made, (inputs, state) = recurrent.delta_attention(
        delta, raw, own["conv1d.weight"][:, 0], own["dt_bias"], own["A_log"], own["norm.weight"], (inputs, state)
    )
    return linear(made.to(x.dtype), weights["linear_attn.out_proj.weight"]), inputs, state


def _scaled(attention: Attention, queries: torch.Tensor, past: int) -> torch.Tensor:
    """``queries`` [T, heads, n] behind ``past`` positions."""
    if not attention.scale_every:
        return queries
    at = torch.arange(past, past + len(queries)) // attention.scale_every
    return queries * position_scales(attention.scale_slope)[at].to(queries.dtype)[:, None, None]


def _latent_attention(
    attention: Attention,
    latent: Latent,
    weights: Weights,
    project: Callable[[str, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert attention.qk_norm is not None
    if latent.two_steps:
        queries = project("q_b", norm(attention.qk_norm, weights, "self_attn.q_a_layernorm", project("q_a", x)))
    else:
        queries = project("q", x)
    queries = queries.view(len(x), attention.heads, -1)
    made = linear(x, weights["self_attn.kv_a_proj_with_mqa.weight"], weights.get("self_attn.kv_a_proj_with_mqa.bias"))
    rows = norm(attention.qk_norm, weights, "self_attn.kv_a_layernorm", made[:, : latent.rank].contiguous())
    turned = _rotate(made[:, latent.rank :].unsqueeze(1), cos, sin, attention)
    keys, values = torch.cat([keys, rows.unsqueeze(1)]), torch.cat([values, turned])
    queries = torch.cat([queries[..., : latent.nope], _rotate(queries[..., latent.nope :], cos, sin, attention)], dim=-1)
    queries = _scaled(attention, queries, len(keys) - len(x))
    both = project("kv_b", keys[:, 0]).view(len(keys), attention.heads, -1)
    whole = torch.cat([both[..., : latent.nope], values.expand(-1, attention.heads, -1)], dim=-1)
    scores = torch.einsum("thd,shd->hts", queries.float(), whole.float()) * attention.scaling
    unseen = torch.ones(len(x), len(keys), dtype=torch.bool).triu(len(keys) - len(x) + 1)
    mixed = torch.einsum("hts,shd->thd", scores.masked_fill(unseen, -torch.inf).softmax(-1), both[..., latent.nope :].float())
    return project("o", mixed.flatten(1).to(x.dtype)), keys, values


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
    """[T, heads, head_dim]: channels from rotary_dim on stay."""
    if attention.half_angles:
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    if attention.rope != "halves":
        return elementary.turn_pairs(x, cos, sin, attention.rope == "pairs apart").to(x.dtype)
    turned, rest = x[..., : attention.rotary_dim], x[..., attention.rotary_dim :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
    return torch.cat([turned, rest], dim=-1)


def _route(plain: PlainLayer, weights: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token the experts [T, top_k], best first, and their weights, in x's dtype if they are rounded to it."""
    router, name = plain.router, f"{plain.block}.{plain.router_name}"
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    logits = linear(x, weight, bias) if router.rounds_logits else linear(x.float(), weight.float(), bias)
    correction = weights[f"{plain.block}.{router.correction}"].flatten() if router.correction else None
    if x.dtype != torch.bfloat16:
        router = replace(router, rounds_logits=False, rounds_weights=False)
    chosen, scores = route(router, logits.float(), correction)
    return chosen, scores.to(x.dtype) if router.rounds_weights else scores


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def _mlp(mlp: Mlp, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    if mlp.joined:
        gate, up = linear(x, weights[f"{name}.input_linear.weight"]).chunk(2, dim=-1)
        return linear(_ACTIVATIONS[mlp.activation](gate) * up, weights[f"{name}.output_linear.weight"])
    gate, up = (
        linear(x, weights[f"{name}.{part}_proj.weight"], weights.get(f"{name}.{part}_proj.bias")) for part in ("gate", "up")
    )
    if mlp.limit is not None:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
    return linear(
        _ACTIVATIONS[mlp.activation](gate) * up, weights[f"{name}.down_proj.weight"], weights.get(f"{name}.down_proj.bias")
    )
