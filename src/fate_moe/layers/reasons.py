"""Why an executor cannot run a plain layer, or the model around it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fate_moe.kernels.native import native, why_not
from fate_moe.kernels.plain_layer import Attention, PlainLayer
from fate_moe.layers.canonical import HEADS, ROPES, TRUNKS, HeadCode, RopeCode, TrunkCode, meaning_of
from fate_moe.layers.plain import NotPlain, plain_decoder, recognise_norm
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


def cuda_reasons(model: Any) -> list[str]:
    """Why the GPU's decode step cannot run ``model``; none if it can."""
    layers, reasons = plain_decoder(model), list[str]()
    for layer in layers:
        found = layer.reasons if isinstance(layer, NotPlain) else _layer_cuda_reasons(model, layer)
        reasons += [f"{re.sub(r'(?<=[.])[0-9]+$', '*', layer.path)}: {reason}" for reason in found]
    plain = [layer for layer in layers if isinstance(layer, PlainLayer)]
    if not fuse():
        reasons.append("FATE_FUSE=0 turns the decode step off")
    if len({_shape_of(layer) for layer in plain}) > 1 or len({_moe_of(layer) for layer in plain if not layer.is_dense}) != 1:
        reasons.append("its layers differ in more than their weights")
    return list(dict.fromkeys([*reasons, *_trunk_reasons(model, plain)]))


def _layer_cuda_reasons(model: Any, plain: PlainLayer) -> Iterable[str]:
    attention, shared = plain.attention, plain.shared
    if attention.latent is not None or attention.delta is not None:
        yield "its keys and values are latent rows" if attention.delta is None else "it keeps a state, and no keys and values"
        return
    if attention.gated or attention.norm_after_rope or attention.scale_every:
        yield "its attention is of another kind"
    if attention.rope not in ("halves", "pairs"):
        yield "its rotary embedding is of another kind"
    if any(norm.offset for norm in (plain.input_norm, plain.post_norm)):
        yield "its norms are of another kind"
    of_heads = attention.qk_norm
    if of_heads is not None and (of_heads.centered or of_heads.bias or of_heads.offset or not of_heads.rounds_first):
        yield "the norms of its queries and keys are of another kind"
    if attention.head_dim & (attention.head_dim - 1):
        yield f"its heads have {attention.head_dim} channels, which is no power of two"
    if attention.rotary_dim % 2 or not attention.rotary_dim:
        yield f"its rotary embedding turns {attention.rotary_dim} channels"
    if plain.block_norm is not None or (shared is not None and (shared.of_layer or shared.mlp.joined)):
        yield "its MoE block is of another kind"
        return
    if plain.residual_scale != 1.0:
        yield f"what is added to the residual stream is scaled by {plain.residual_scale:g}"
    if shared is None:
        return
    if shared.mlp.activation != "silu" or shared.mlp.limit is not None:
        yield f"its MLP's activation is {shared.mlp.activation}{'' if shared.mlp.limit is None else ' with a limit'}"
    mlp = model.get_submodule(f"{plain.path}.{plain.block}.{shared.name}".rstrip("."))
    if any(getattr(part, "bias", None) is not None for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        yield "its MLP's matrices have biases"


def _shape_of(plain: PlainLayer) -> tuple[Any, ...]:
    """What must be the same for all layers of one step."""
    attention = plain.attention
    return plain.hidden, attention.heads, attention.kv_heads, attention.head_dim, attention.qkv_bias


def _moe_of(plain: PlainLayer) -> tuple[Any, ...]:
    """What must be the same for all layers with experts."""
    return plain.router, plain.shared


def _trunk_reasons(model: Any, plain: Sequence[PlainLayer]) -> Iterable[str]:
    """What of the model around its layers the step does in its own way."""
    trunk = getattr(model, "model", None)
    if len(plain) < len(getattr(trunk, "layers", ())):
        yield "some of its layers are not plain"
    if meaning_of(type(model), HEADS) != HeadCode():
        yield f"{type(model).__name__} makes logits in a way that is not known"
    if trunk is None or meaning_of(type(trunk), TRUNKS) != TrunkCode():
        yield f"{type(trunk).__name__} runs its layers in a way that is not known"
        return
    if meaning_of(type(trunk.rotary_emb), ROPES) is None:
        yield f"{type(trunk.rotary_emb).__name__} makes rotary frequencies in a way that is not known"
    if getattr(trunk.rotary_emb, "rope_type", "default") not in RopeCode().kinds:
        yield "its rotary frequencies depend on the length of the text"
    final = recognise_norm(trunk.norm)
    if isinstance(final, list):
        yield f"norm: {'; '.join(final)}"
    elif final.offset:
        yield "norm: it is of another kind"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
