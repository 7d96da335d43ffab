"""Which of a model's layers are plain, recognised once from the code of their classes, their attributes and the configuration.

Nothing is tried and nothing is guessed: a layer is plain if the code of each of its parts is code that ``canonical.py`` knows. A
layer that is not says every reason; so does an executor that cannot run a plain layer (``reasons.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.meta_model import ExpertStack, expert_stacks
from fate_moe.kernels.plain_layer import NO_ROUTER, Attention, Delta, Latent, Mlp, Norm, PlainLayer, Router, SharedExpert
from fate_moe.layers.canonical import (
    ATTENTIONS,
    BLOCKS,
    DELTAS,
    GATED_NORMS,
    LAYERS,
    MLPS,
    NORMS,
    ROUTERS,
    AttentionCode,
    BlockCode,
    DeltaCode,
    LayerCode,
    attends_as,
    meaning_of,
)

__all__ = [
    "NotPlain",
    "PlainLayer",
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
    if code is not None and code.shared and getattr(model.get_submodule(path), code.shared) is not None:
        mlp = _part(model.get_submodule(path), code.shared, recognise_mlp, reasons)
        shared = SharedExpert(mlp, code.shared, of_layer=True)
    norm = _part(block, block_code.norm, recognise_norm, reasons) if block_code is not None and block_code.norm else None
    if reasons or around is None or block_code is None or router is None:
        return NotPlain(stack.layer, path, tuple(reasons))
    return replace(
        around,
        layer=stack.layer,
        block=name,
        router_name=".".join(filter(None, (block_code.router, router_weight_of(block.get_submodule(block_code.router))))),
        router=router,
        shared=shared,
        block_norm=(block_code.norm, norm) if block_code.norm and norm is not None else None,
    )


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
    name = "linear_attn" if "linear_attn" in dict(layer.named_children()) else "self_attn"
    attention = _part(layer, name, recognise_attention, reasons)
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
    name = type(module.activation if code.joined else module.act_fn).__name__
    return Mlp(_ACTIVATIONS.get(name, name), None if limit is None else float(limit), code.joined)


def recognise_attention(module: nn.Module) -> Attention | list[str]:
    """The attention that ``module`` is, or every reason why it is none."""
    of: Any = module
    delta = meaning_of(type(module), DELTAS)
    if delta is not None:
        return _delta(of, delta)
    code = meaning_of(type(module), ATTENTIONS)
    if code is None:
        return [f"{type(module).__name__} is no attention that is known"]
    if code.latent:
        return _latent_attention(of, code)
    with_norms = bool(code.norms) and bool(getattr(of, code.norms_if) if code.norms_if else True)
    norm = None
    if with_norms:
        found = [recognise_norm(getattr(of, name)) for name in code.norm_names]
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
        heads=of.q_proj.out_features // (2 * dim if code.gated else dim),
        kv_heads=of.k_proj.out_features // dim,
        head_dim=dim,
        scaling=float(of.scaling),
        rotary_dim=_rotary_dim(of, code, dim),
        qkv_bias=of.q_proj.bias is not None,
        out_bias=of.o_proj.bias is not None,
        qk_norm=norm,  # type: ignore[arg-type]
        norm_over_heads=with_norms and code.norms == "all",
        clip=getattr(of.config, code.clip) if code.clip else None,
        window=_window(of, code),
        sinks=code.sinks is not None,
        rope=code.rope,
        half_angles=code.half_angles,
        norm_names=code.norm_names,
        norm_after_rope=code.norm_after_rope,
        gated=code.gated,
        angles_unused=code.rope_if_sliding,
    )


def _delta(of: Any, code: DeltaCode) -> Attention | list[str]:
    norm = meaning_of(type(of.norm), GATED_NORMS)
    if norm is None:
        return [f"its norm: {type(of.norm).__name__} is no norm with a gate that is known"]
    if of.activation != "silu" or of.norm.activation != "silu":
        return [f"its activation is {of.activation}"]
    if of.conv1d.bias is not None or any(getattr(of, name).bias is not None for name in (*code.inputs, "out_proj")):
        return ["its matrices have biases"]
    found = Norm(float(getattr(of.norm, norm.eps)), norm.rounds_first, offset=norm.offset)
    delta = Delta(
        key_heads=int(of.num_k_heads),
        value_heads=int(of.num_v_heads),
        key_dim=int(of.head_k_dim),
        value_dim=int(of.head_v_dim),
        kernel=int(of.conv_kernel_size),
        norm=found,
        inputs=code.inputs,
        by_head=code.by_head,
    )
    return Attention(int(of.layer_idx), delta.value_heads, delta.key_heads, delta.value_dim, 1.0, 0, delta=delta)


def _latent_attention(of: Any, code: AttentionCode) -> Attention | list[str]:
    two_steps = of.q_lora_rank is not None
    norms = [recognise_norm(norm) for norm in ([of.q_a_layernorm] if two_steps else []) + [of.kv_a_layernorm]]
    if reasons := [f"its norms: {reason}" for each in norms if isinstance(each, list) for reason in each]:
        return list(dict.fromkeys(reasons))
    if any(norm != norms[0] for norm in norms):
        return ["its queries and keys have different norms"]
    if of.kv_b_proj.bias is not None or (two_steps and of.q_b_proj.bias is not None):
        return ["its matrices after latent rows have biases"]
    parameters = of.config.rope_parameters if code.scaled else {}
    if any(parameters.get(name, 0) is None for name in ("original_max_position_embeddings", "llama_4_scaling_beta")):
        return ["how it scales queries by position is not said"]
    apart = code.rope == "halves" and bool(getattr(of.config, "rope_interleave", False))
    rank, rope = int(of.kv_lora_rank), int(of.qk_rope_head_dim)
    return Attention(
        index=int(of.layer_idx),
        heads=int(of.num_heads),
        kv_heads=1,
        head_dim=rank + rope,
        scaling=float(of.scaling),
        rotary_dim=rope,
        qkv_bias=of.kv_a_proj_with_mqa.bias is not None,
        out_bias=of.o_proj.bias is not None,
        qk_norm=norms[0],  # type: ignore[arg-type]
        rope="pairs apart" if apart else code.rope,
        half_angles=code.half_angles,
        latent=Latent(rank, int(of.qk_nope_head_dim), int(of.v_head_dim), two_steps),
        complex_angles=code.complex_angles,
        scale_every=int(parameters["original_max_position_embeddings"]) if code.scaled else 0,
        scale_slope=float(parameters["llama_4_scaling_beta"]) if code.scaled else 0.0,
    )


def _rotary_dim(module: Any, code: AttentionCode, dim: int) -> int:
    """How many channels of a head are turned."""
    config = module.config
    if code.rope_if_sliding and module.sliding_window is not None and not module.is_sliding:
        return 0
    if code.bases and not getattr(config, code.bases)[module.layer_idx]:
        return 0
    if code.rope_if is not None and getattr(config, code.rope_if[0], None) != code.rope_if[1]:
        return 0
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(dim * float(parameters.get("partial_rotary_factor", 1.0))) if code.partial_rope else dim


def _window(module: Any, code: AttentionCode) -> int | None:
    """Tokens that a query sees: what attention itself is given, or what masks and cache are made for."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    masked = "sliding" in kinds[module.layer_idx] if kinds else bool(getattr(config, "use_sliding_window", True))
    if code.rope_if_sliding:
        return int(module.sliding_window) if module.is_sliding else None
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
    weight = router if meaning.weight is None else getattr(router, meaning.weight)
    wide = meaning.weight is not None and weight.weight.dtype == torch.float32
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
        rounds_logits=not meaning.exact_logits and not wide,
        rounds_weights=not meaning.exact_weights and not wide,
        bias=getattr(weight, "bias", None) is not None,
    )


def router_weight_of(router: nn.Module) -> str | None:
    """The child of ``router`` that has its weight, if it has not itself."""
    meaning = meaning_of(type(router), ROUTERS)
    return meaning.weight if meaning is not None else None


def _shared(block: nn.Module, code: BlockCode | None, reasons: list[str]) -> SharedExpert | None:
    if code is None or code.shared is None or getattr(block, code.shared, None) is None:
        return None
    mlp = _part(block, code.shared, recognise_mlp, reasons)
    return None if mlp is None else SharedExpert(mlp, code.shared, code.gate)
