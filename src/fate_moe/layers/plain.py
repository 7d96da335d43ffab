"""Which of a model's layers are plain, recognised once from the code of their classes, their attributes and the configuration.

Nothing is tried and nothing is guessed: a layer is plain if the code of each of its parts is code that ``canonical.py`` knows. A
layer that is not says every reason; so does an executor that cannot run a plain layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.meta_model import ExpertStack, expert_stacks
from fate_moe.kernels.native import native, why_not
from fate_moe.kernels.plain_layer import NO_ROUTER, Attention, Mlp, Norm, PlainLayer, Router, SharedExpert
from fate_moe.layers.canonical import (
    ATTENTIONS,
    BLOCKS,
    HEADS,
    LAYERS,
    MLPS,
    NORMS,
    ROPES,
    ROUTERS,
    TRUNKS,
    AttentionCode,
    BlockCode,
    LayerCode,
    attends_as,
    meaning_of,
)
from fate_moe.switches import fuse

__all__ = [
    "NotPlain",
    "PlainLayer",
    "attention_reasons",
    "cpu_reasons",
    "cuda_reasons",
    "plain_decoder",
    "plain_layers",
    "recognise",
    "recognise_attention",
    "recognise_dense",
    "recognise_mlp",
    "recognise_norm",
]

# transformers' classes of activations by the names that configurations use.
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


@dataclass(frozen=True)
class NotPlain:
    """The decoder layer at ``path``, whose MoE block is number ``layer``, and all ``reasons`` why it is not plain."""

    layer: int
    path: str
    reasons: tuple[str, ...]


def plain_layers(model: nn.Module) -> list[PlainLayer | NotPlain]:
    """All layers of ``model`` that have experts; they may be on the meta device."""
    return [recognise(model, stack) for stack in expert_stacks(model)]


def plain_decoder(model: nn.Module) -> list[PlainLayer | NotPlain]:
    """All layers of ``model``'s decoder, those without experts too, in their order."""
    stacks = {stack.block.rpartition(".")[0]: stack for stack in expert_stacks(model)}
    found = list[PlainLayer | NotPlain]()
    for decoder in dict.fromkeys(path.rpartition(".")[0] for path in stacks):
        layers = model.get_submodule(decoder)
        names = [f"{decoder}.{name}" for name, _ in layers.named_children()] if isinstance(layers, nn.ModuleList) else []
        for path in names or [path for path in stacks if path.rpartition(".")[0] == decoder]:
            found.append(recognise(model, stacks[path]) if path in stacks else recognise_dense(model, path))
    return found


def recognise(model: nn.Module, stack: ExpertStack) -> PlainLayer | NotPlain:
    """What the decoder layer around ``stack`` is."""
    path, _, name = stack.block.rpartition(".")
    block = model.get_submodule(stack.block)
    reasons = list[str]()
    code = _layer_code(model.get_submodule(path), reasons)
    if code is not None and code.block != name:
        reasons.append(f"{type(model.get_submodule(path)).__name__} has its experts in {name}, not in {code.block}")
    if stack.twins:
        reasons.append("another layer has the same experts")
    block_code = meaning_of(type(block), BLOCKS)
    if block_code is None:
        reasons.append(f"{type(block).__name__} runs router and experts in a way that is not known")
    around = _around(model, path, code, reasons)
    router = _router(block, block_code, stack, reasons)
    shared = _shared(block, block_code, reasons)
    if reasons or around is None or block_code is None or router is None:
        return NotPlain(stack.layer, path, tuple(reasons))
    return replace(around, layer=stack.layer, block=name, router_name=block_code.router, router=router, shared=shared)


def recognise_dense(model: nn.Module, path: str) -> PlainLayer | NotPlain:
    """What the decoder layer at ``path``, which has no experts, is."""
    reasons = list[str]()
    code = _layer_code(model.get_submodule(path), reasons)
    around = _around(model, path, code, reasons)
    mlp = _part(model.get_submodule(path), code.block, recognise_mlp, reasons) if code is not None else None
    if reasons or around is None or mlp is None:
        return NotPlain(-1, path, tuple(reasons))
    return replace(around, shared=SharedExpert(mlp, ""))


def _layer_code(layer: nn.Module, reasons: list[str]) -> LayerCode | None:
    code = meaning_of(type(layer), LAYERS)
    if code is None:
        reasons.append(f"{type(layer).__name__} puts its parts together in a way that is not known")
    return code


def _around(model: nn.Module, path: str, code: LayerCode | None, reasons: list[str]) -> PlainLayer | None:
    """What the layer at ``path`` is around its MoE block or MLP; None where ``reasons`` grew."""
    layer: Any = model.get_submodule(path)
    norms = [_part(layer, child, recognise_norm, reasons) for child in ("input_layernorm", "post_attention_layernorm")]
    attention = _part(layer, "self_attn", recognise_attention, reasons)
    if code is None or attention is None or None in norms:
        return None
    hidden = layer.input_layernorm.weight.numel()
    scale = float(getattr(layer, code.residual)) if code.residual else 1.0
    return PlainLayer(-1, path, code.block, "", hidden, norms[0], attention, norms[1], NO_ROUTER, residual_scale=scale)


def _part(owner: nn.Module, name: str, recognise_it: Any, reasons: list[str]) -> Any:
    """What ``owner``'s child is, or None; its reasons are added to ``reasons`` with its name."""
    child = dict(owner.named_children()).get(name)
    if child is None:
        reasons.append(f"{type(owner).__name__} has no {name}")
        return None
    found = recognise_it(child)
    if isinstance(found, list):
        reasons += [f"{name}: {reason}" for reason in found]
        return None
    return found


def recognise_norm(module: nn.Module) -> Norm | list[str]:
    """The norm that ``module`` is, or why it is none."""
    weight = module._parameters.get("weight")
    if type(module) is nn.LayerNorm and weight is not None and weight.ndim == 1:
        return Norm(module.eps, rounds_first=False, centered=True, bias=module.bias is not None)
    code = meaning_of(type(module), NORMS)
    if code is None:
        return [f"{type(module).__name__} is no norm that is known"]
    if weight is None or weight.ndim != 1:
        return [f"{type(module).__name__} has no weight"]
    return Norm(float(getattr(module, code.eps)), code.rounds_first, offset=code.offset)


def recognise_mlp(module: nn.Module) -> Mlp | list[str]:
    """The gated MLP that ``module`` is, or why it is none."""
    code = meaning_of(type(module), MLPS)
    if code is None:
        return [f"{type(module).__name__} is no gated MLP that is known"]
    limit = getattr(module, code.limit) if code.limit else None
    name = type(module.act_fn).__name__
    return Mlp(_ACTIVATIONS.get(name, name), None if limit is None else float(limit))


def recognise_attention(module: nn.Module) -> Attention | list[str]:
    """The attention that ``module`` is, or every reason why it is none."""
    code = meaning_of(type(module), ATTENTIONS)
    if code is None:
        return [f"{type(module).__name__} is no attention that is known"]
    of: Any = module
    with_norms = bool(code.norms) and bool(getattr(of, code.norms_if) if code.norms_if else True)
    norm = None
    if with_norms:
        found = [recognise_norm(of.q_norm), recognise_norm(of.k_norm)]
        if reasons := [f"its norms: {reason}" for each in found if isinstance(each, list) for reason in each]:
            return list(dict.fromkeys(reasons))
        if found[0] != found[1]:
            return ["its queries and keys have different norms"]
        norm = found[0]
    if code.sinks and not attends_as(type(module), code.sinks):
        return ["its attention sinks are used in a way that is not known"]
    dim = int(of.head_dim)
    return Attention(
        index=int(of.layer_idx),
        heads=of.q_proj.out_features // dim,
        kv_heads=of.k_proj.out_features // dim,
        head_dim=dim,
        scaling=float(of.scaling),
        rotary_dim=_rotary_dim(of.config, code, dim),
        qkv_bias=of.q_proj.bias is not None,
        out_bias=of.o_proj.bias is not None,
        qk_norm=norm,  # type: ignore[arg-type]
        norm_over_heads=with_norms and code.norms == "all",
        clip=getattr(of.config, code.clip) if code.clip else None,
        window=_window(of, code),
        sinks=code.sinks is not None,
        rope=code.rope,
        half_angles=code.half_angles,
    )


def _rotary_dim(config: Any, code: AttentionCode, dim: int) -> int:
    """How many channels of a head are turned."""
    if code.rope_if is not None and getattr(config, code.rope_if[0], None) != code.rope_if[1]:
        return 0
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(dim * float(parameters.get("partial_rotary_factor", 1.0))) if code.partial_rope else dim


def _window(module: Any, code: AttentionCode) -> int | None:
    """Tokens that a query sees: what attention itself is given, or what masks and cache are made for."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    masked = "sliding" in kinds[module.layer_idx] if kinds else bool(getattr(config, "use_sliding_window", True))
    window = getattr(module, "sliding_window", None) or (getattr(config, code.window, None) if code.window else None)
    if masked:
        window = window or getattr(config, "sliding_window", None)
    return int(window) if window else None


def _router(block: nn.Module, code: BlockCode | None, stack: ExpertStack, reasons: list[str]) -> Router | None:
    if code is None:
        return None
    router: Any = block.get_submodule(code.router)
    meaning = meaning_of(type(router), ROUTERS)
    if meaning is None:
        reasons.append(f"{code.router}: {type(router).__name__} is no router that is known")
        return None
    method = getattr(router, meaning.method) if meaning.method else None
    if method not in (None, "greedy", "group_limited_greedy"):
        reasons.append(f"{code.router}: it chooses by {method}")
    if router.top_k != stack.top_k:
        reasons.append(f"{code.router}: it chooses {router.top_k} experts, the configuration says {stack.top_k}")
    groups, top_groups = 1, 1
    if meaning.groups and method != "greedy":
        groups, top_groups = (int(getattr(router, name)) for name in meaning.groups)
    size, rest = divmod(stack.num_experts, max(1, groups))
    if rest or not 1 <= top_groups <= groups or (groups > 1 and (size < meaning.group_best or size * top_groups < stack.top_k)):
        reasons.append(f"{code.router}: it chooses {top_groups} of {groups} groups, which {stack.num_experts} experts do not have")
    correction = f"{code.router}.{meaning.correction}" if meaning.correction else code.correction
    return Router(
        stack.num_experts,
        stack.top_k,
        meaning.normalize if isinstance(meaning.normalize, bool) else bool(getattr(router, meaning.normalize)),
        float(getattr(router, meaning.scale)) if meaning.scale else 1.0,
        scores=meaning.scores,
        correction=correction,
        groups=groups,
        top_groups=top_groups,
        group_best=meaning.group_best,
        floor=float(getattr(router, meaning.floor)) if isinstance(meaning.floor, str) else meaning.floor,
        spread=2 * float(getattr(router, meaning.spread)) if meaning.spread else 0.0,
        rounds_logits=not meaning.exact,
        rounds_weights=not meaning.exact or meaning.rounds_weights,
        bias=getattr(router, "bias", None) is not None,
    )


def _shared(block: nn.Module, code: BlockCode | None, reasons: list[str]) -> SharedExpert | None:
    if code is None or code.shared is None or getattr(block, code.shared, None) is None:
        return None
    mlp = _part(block, code.shared, recognise_mlp, reasons)
    return None if mlp is None else SharedExpert(mlp, code.shared, code.gate)


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
    if meaning_of(type(model), HEADS) is None:
        yield f"{type(model).__name__} makes logits in a way that is not known"
    if trunk is None or meaning_of(type(trunk), TRUNKS) is None:
        yield f"{type(trunk).__name__} runs its layers in a way that is not known"
        return
    if meaning_of(type(trunk.rotary_emb), ROPES) is None:
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
