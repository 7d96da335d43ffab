"""Why an executor cannot run a plain layer, or the model around it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fate_moe.kernels.native import native, why_not
from fate_moe.kernels.plain_layer import Attention, PlainLayer
from fate_moe.layers.canonical import HEADS, ROPES, TRUNKS, HeadCode, RopeCode, TrunkCode, meaning_of
from fate_moe.layers.plain import NotPlain, recognise_norm
from fate_moe.switches import fuse

__all__ = ["attention_reasons", "cpu_reasons", "cuda_reasons"]


def cpu_reasons(plain: PlainLayer, dtype: torch.dtype) -> list[str]:
    """Why the CPU cannot run ``plain`` whole in a model of ``dtype``; none if it can."""
    reasons = attention_reasons(plain.attention)
    if native is None:
        reasons.append(why_not() or "the extension is not built")
    if not fuse():
        reasons.append("FATE_FUSE=0 turns whole layers off")
    if dtype != torch.bfloat16:
        reasons.append(f"the model is in {_named(dtype)}; whole layers run in bfloat16")
    return reasons


def attention_reasons(attention: Attention) -> list[str]:
    """Why no kernel runs ``attention`` on the CPU; none if one does."""
    if attention.latent is not None and attention.latent.rank % 16:
        return [f"its latent rows have {attention.latent.rank} channels, which 16 does not divide"]
    delta = attention.delta
    if delta is not None and (delta.value_dim % 16 or delta.value_heads % delta.key_heads):
        return [f"its heads have {delta.value_dim} values, which 16 does not divide, or no whole number of them shares keys"]
    if attention.rotary_dim % 2:
        return [f"its rotary embedding turns {attention.rotary_dim} channels, an odd number"]
    return []


def cuda_reasons(model: Any, layers: Sequence[PlainLayer | NotPlain]) -> list[str]:
    """Why the GPU's decode step cannot run ``model``, whose layers with experts are ``layers``; none if it can."""
    reasons = list[str]()
    for layer in layers:
        found = layer.reasons if isinstance(layer, NotPlain) else _layer_cuda_reasons(layer)
        reasons += [f"{re.sub(r'(?<=[.])[0-9]+$', '*', layer.path)}: {reason}" for reason in found]
    plain = [layer for layer in layers if isinstance(layer, PlainLayer)]
    if not fuse():
        reasons.append("FATE_FUSE=0 turns the decode step off")
    if len({_shape_of(layer) for layer in plain}) > 1:
        reasons.append("its layers differ in more than their weights")
    return list(dict.fromkeys([*reasons, *_trunk_reasons(model, plain)]))


def _layer_cuda_reasons(plain: PlainLayer) -> Iterable[str]:
    attention, shared = plain.attention, plain.shared
    if attention.window is not None:
        yield f"its attention has a sliding window ({attention.window} tokens)"
    if attention.sinks:
        yield "its attention has sinks"
    if attention.latent is not None or attention.delta is not None:
        yield "its keys and values are latent rows" if attention.delta is None else "it keeps a state, and no keys and values"
        return
    if attention.gated or attention.norm_after_rope or attention.scale_every:
        yield "its attention is of another kind"
    if attention.rope != "halves" or attention.half_angles:
        yield "its rotary embedding is of another kind"
    if any(norm.centered or norm.bias or norm.offset for norm in (plain.input_norm, plain.post_norm, attention.qk_norm) if norm):
        yield "its norms are of another kind"
    if attention.norm_over_heads:
        yield "its queries and keys are normed over all heads together"
    if attention.clip is not None:
        yield "its queries, keys and values are clipped"
    if attention.rotary_dim != attention.head_dim:
        yield f"its rotary embedding turns {attention.rotary_dim} of {attention.head_dim} channels"
    elif attention.head_dim % 2:
        yield f"its heads have {attention.head_dim} channels, an odd number"
    if plain.block_norm is not None or (shared is not None and (shared.of_layer or shared.mlp.joined)):
        yield "its MoE block is of another kind"
    router = plain.router
    if router.scale != 1.0:
        yield f"its experts' weights are scaled by {router.scale:g}"
    if router.scores != "softmax" or router.correction or router.groups > router.top_groups or router.floor or router.bias:
        yield "its router chooses by more than a softmax"
    if plain.residual_scale != 1.0:
        yield f"what is added to the residual stream is scaled by {plain.residual_scale:g}"
    if attention.scaling != attention.head_dim**-0.5:
        yield f"its attention is scaled by {attention.scaling:g}"
    if attention.out_bias:
        yield "its attention's output has a bias"
    if shared is not None and shared.gate is None:
        yield "its shared expert has no gate"
    if shared is not None and (shared.mlp.activation != "silu" or shared.mlp.limit is not None):
        yield f"its shared expert's activation is {shared.mlp.activation}{'' if shared.mlp.limit is None else ' with a limit'}"


def _shape_of(plain: PlainLayer) -> tuple[Any, ...]:
    """What must be the same for all layers of one step."""
    attention = plain.attention
    norms = plain.input_norm.eps, plain.post_norm.eps, attention.qk_norm
    return (
        plain.hidden,
        norms,
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        attention.qkv_bias,
        plain.router,
        plain.shared,
    )


def _trunk_reasons(model: Any, plain: Sequence[PlainLayer]) -> Iterable[str]:
    """What of the model around its layers the step does in its own way."""
    trunk = getattr(model, "model", None)
    if len(plain) < len(getattr(trunk, "layers", ())):
        yield "some of its layers have no experts, or are not plain"
    if meaning_of(type(model), HEADS) != HeadCode():
        yield f"{type(model).__name__} makes logits in a way that is not known"
    if trunk is None or meaning_of(type(trunk), TRUNKS) != TrunkCode():
        yield f"{type(trunk).__name__} runs its layers in a way that is not known"
        return
    if meaning_of(type(trunk.rotary_emb), ROPES) != RopeCode():
        yield f"{type(trunk.rotary_emb).__name__} makes rotary frequencies in a way that is not known"
    if getattr(trunk.rotary_emb, "rope_type", "default") != "default":
        yield "its rotary frequencies are scaled"
    if model.config.hidden_act != "silu":
        yield f"its activation is {model.config.hidden_act}"
    eps = {norm.eps for layer in plain for norm in (layer.input_norm, layer.post_norm, layer.attention.qk_norm) if norm is not None}
    final = recognise_norm(trunk.norm)
    if isinstance(final, list):
        yield f"norm: {'; '.join(final)}"
    elif len(eps | {final.eps}) > 1:
        yield "its norms have different eps"
    if getattr(model.lm_head, "bias", None) is not None:
        yield "its head has a bias"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
