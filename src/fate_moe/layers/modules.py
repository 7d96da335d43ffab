"""Modules that are what most families have, run by one call of the extension each where a token or a few come.

RMSNorm, gated MLPs, attention with rotate-half rope. Which modules these are is found by trying them on numbers, not by a list of
families: what a module gives must be what ours gives, else it stays as it is. The family's own forward stays for everything else:
many tokens, masks, other caches, gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.cache_utils import DynamicCache

from fate_moe.adapter.contract import is_experts
from fate_moe.adapter.families import ROUTER_NAMES
from fate_moe.adapter.kv_cache import RoomyLayer, make_room
from fate_moe.core import Patcher
from fate_moe.kernels.activations import find_activation
from fate_moe.kernels.native import BF16, DTYPES, native
from fate_moe.layers.dense import MOST_ROWS, QuantizedLinear

__all__ = ["ModuleSnapshot", "SmallWeight", "accelerate", "accelerated_by", "is_near", "room_in", "weight_of"]

# Unquantized matrices up to so many weights are multiplied by the extension: oneDNN takes 250 us for a router of 60 x 2048 in bf16.
_SMALL = 1 << 20
_PROBE_TOKENS = 6
_NEAR = 0.02  # of the norm: int8 activations and bf16 roundings give 0.01, another rope or scaling more than 0.1

Forward = Callable[..., Any]
Accelerated = tuple[Forward, Any]  # a forward, and what ``accelerated_by`` gives


@torch.no_grad()
def accelerate(model: Any, exact: bool, patcher: Patcher) -> Counter[str]:
    """Let the extension run ``model``'s standard modules; how many of each kind. Does nothing without the extension."""
    found: Counter[str] = Counter()
    if native is None or model.dtype not in (torch.float32, torch.bfloat16):
        return found
    inside_experts = {part for module in model.modules() if is_experts(module) for part in module.modules()}
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if module in inside_experts:
            continue
        kind, accelerated = _accelerated(module, model, exact, generator)
        if accelerated is not None:
            patcher.replace(module, "forward", accelerated[0])
            patcher.replace(module, "fate_accelerated", accelerated[1])
            found[kind] += 1
        weight = module._parameters.get("weight")
        small = weight is not None and weight.dim() == 2 and weight.dtype == torch.bfloat16 and 0 < weight.numel() <= _SMALL
        if small and (type(module) is nn.Linear or name.rpartition(".")[2] in ROUTER_NAMES):
            patcher.replace(module, "weight", SmallWeight.of(weight))
            found["small matrices"] += 1
    return found


def accelerated_by(module: nn.Module) -> Any:
    """What ``accelerate`` gave ``module``: a norm's eps, the extension's Mlp or Attention; None if nothing."""
    return getattr(module, "fate_accelerated", None)


def _accelerated(module: nn.Module, model: Any, exact: bool, generator: torch.Generator) -> tuple[str, Accelerated | None]:
    names = {name for name, _ in module.named_children()}
    if type(module).__name__.endswith("RMSNorm"):
        return "norms", _norm(module, model.dtype, generator)
    if {"gate_proj", "up_proj", "down_proj"} <= names:
        return "MLPs", _mlp(module, model.dtype, exact, generator)
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= names:
        return "attentions", _attention(module, model, exact, generator)
    return "", None


class SmallWeight(nn.Parameter):
    """A bf16 matrix that multiplies a few rows itself, whoever calls torch's ``linear`` on it."""

    place: Any
    address: int
    rows: int
    cols: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> SmallWeight:
        """Shares ``weight``'s memory."""
        made = cls(weight, requires_grad=False)
        made.rows, made.cols, made.address = weight.shape[0], weight.shape[1], weight.data_ptr()
        made.place = native.Place.make(BF16, made.rows, made.cols, [0], 0, 0, -1, 0)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and not kwargs and (len(args) == 2 or args[2] is None):
            x, own = args[0], vars(args[1])  # a tensor's own properties would come back here
            cols = own.get("cols", 0)
            with torch._C.DisableTorchFunctionSubclass():
                moved = args[1].data_ptr() != own.get("address")
            few = x.dtype == torch.bfloat16 and x.numel() <= MOST_ROWS * cols and x.is_contiguous() and not x.requires_grad
            if few and not moved:
                out, count = x.new_empty(*x.shape[:-1], own["rows"]), x.numel() // cols
                native.linear(own["place"], own["address"], BF16, x.data_ptr(), 1, count, out.data_ptr(), 1, True, 1)
                return out
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _few(x: torch.Tensor, cols: int, most_rows: int) -> bool:
    """Whether ``x`` [..., cols] is something for the extension."""
    return (
        x.numel() <= most_rows * cols
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.is_contiguous()
        and not x.requires_grad
        and x.numel() > 0
    )


def is_near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two ways to compute the same thing may have given these."""
    return bool((got.float() - want.float()).norm() <= _NEAR * want.float().norm()) and bool(want.abs().max() > 0)


def _norm(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> Accelerated | None:
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        weight is None
        or weight.dim() != 1
        or weight.dtype not in DTYPES
        or len(module._parameters) > 1
        or not isinstance(eps, float)
    ):
        return None
    original, size, address, weight_dtype = module.forward, len(weight), weight.data_ptr(), DTYPES[weight.dtype]

    def forward(x: torch.Tensor) -> Any:
        if not _few(x, size, MOST_ROWS) or weight.data_ptr() != address or module._parameters["weight"] is not weight:
            return original(x)
        out = torch.empty_like(x)
        native.rms_norm(x.data_ptr(), DTYPES[x.dtype], x.numel() // size, size, address, weight_dtype, eps, out.data_ptr())
        return out

    for scale in (1e-3, 1.0, 30.0):  # a small one, where eps matters
        x = (scale * torch.randn(3, size, generator=generator)).to(dtype)
        try:
            want, got = original(x), forward(x)
        except Exception:  # a norm that wants more than one tensor, or another one
            return None
        if want.dtype != got.dtype or (got.float() - want.float()).abs().max() > 4 * torch.finfo(dtype).eps * want.abs().max():
            return None
    return forward, eps


def weight_of(layer: Any) -> Any:
    """The extension's Weight of a linear layer or a router; None if it has no kernel."""
    bias = getattr(layer, "bias", None)
    if bias is not None and bias.dtype not in DTYPES:
        return None
    at, dtype = (bias.data_ptr(), DTYPES[bias.dtype]) if bias is not None else (0, 0)
    if isinstance(layer, QuantizedLinear):
        return native.Weight.make(layer.place, layer.address, at, dtype) if layer.place is not None else None
    weight = getattr(layer, "weight", None)
    if isinstance(weight, SmallWeight):
        return native.Weight.make(vars(weight)["place"], vars(weight)["address"], at, dtype)
    if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16 and layer.weight.is_contiguous():
        place = native.Place.make(BF16, *layer.weight.shape, [0], 0, 0, -1, 0)
        return native.Weight.make(place, layer.weight.data_ptr(), at, dtype)
    return None


class _GateOf:
    """An MLP's activation as find_activation wants to see it."""

    has_gate = True

    def __init__(self, act: Any) -> None:
        self.act_fn = act

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.as_tensor(self.act_fn(gate) * up)


class ModuleSnapshot:
    """Some modules and the modules in them, as they were found: adapters replace parts, hooks want the family's own forward, and
    ``model.to`` moves numbers away from the addresses that the extension was given."""

    def __init__(self, owners: Sequence[nn.Module], hooked: Sequence[nn.Module] = ()) -> None:
        """``hooked``: those whose pre-hooks are ours."""
        self._places = [(owner._modules, name, part) for owner in owners for name, part in owner.named_children()]
        parts = {part for _, _, part in self._places}
        self.hooks: list[Any] = [part._forward_hooks for part in parts]
        self.hooks += [part._forward_pre_hooks for part in parts if part not in hooked]
        self._numbers = [
            (part._parameters, name, tensor, tensor.data_ptr())
            for part in {*parts, *owners}
            if not is_experts(part)
            for name, tensor in part._parameters.items()
            if tensor is not None
        ]

    def same(self) -> bool:
        """Whether all parts and their numbers are where they were."""
        with torch._C.DisableTorchFunctionSubclass():
            numbers = all(held[name] is tensor and tensor.data_ptr() == at for held, name, tensor, at in self._numbers)
        return numbers and all(modules[name] is part for modules, name, part in self._places)


def _mlp(module: Any, dtype: torch.dtype, exact: bool, generator: torch.Generator) -> Accelerated | None:
    layers = ("gate_proj", "up_proj", "down_proj")
    weights = [weight_of(getattr(module, name)) for name in layers]
    act = getattr(module, "act_fn", None)
    how = find_activation(_GateOf(act)) if act is not None and all(weight is not None for weight in weights) else None
    if how is None:
        return None
    original, size, of, watch = (
        module.forward,
        module.gate_proj.in_features,
        native.Mlp.make(*weights, how),
        ModuleSnapshot([module]),
    )

    def forward(x: torch.Tensor) -> Any:
        if not _few(x, size, MOST_ROWS) or any(watch.hooks) or not watch.same():
            return original(x)
        out = torch.empty_like(x)
        native.mlp(of, x.data_ptr(), DTYPES[x.dtype], x.numel() // size, out.data_ptr(), exact, torch.get_num_threads())
        return out

    if module.down_proj.out_features != size or module.up_proj.in_features != size:
        return None
    x = torch.randn(2, size, generator=generator).to(dtype)
    try:
        return (forward, of) if is_near(forward(x), original(x)) else None
    except Exception:  # it wants more than one tensor
        return None


def _attention(module: Any, model: Any, exact: bool, generator: torch.Generator) -> Accelerated | None:
    children = dict(module.named_children())
    layers = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms = [children.get("q_norm"), children.get("k_norm")]
    weights = [weight_of(children[name]) for name in layers]
    size, dim, index = (
        getattr(children["q_proj"], "in_features", 0),
        getattr(module, "head_dim", 0),
        getattr(module, "layer_idx", -1),
    )
    reasons_not = (
        model.dtype != torch.bfloat16
        or any(weight is None for weight in weights)
        or not isinstance(dim, int)
        or not isinstance(index, int)
        or index < 0
        or dim < 2
        or dim % 2
        or children["o_proj"].out_features != size
        or module._parameters
        or any("softcap" in name for name in vars(module))
        or getattr(module, "sliding_window", None) is not None
        or (norms[0] is None) != (norms[1] is None)
        or any(norm is not None and tuple(norm.weight.shape) != (dim,) for norm in norms)
        or getattr(module.config, "_attn_implementation", "") != "sdpa"
    )
    if reasons_not:
        return None
    heads, kv_heads = children["q_proj"].out_features // dim, children["k_proj"].out_features // dim
    addresses = [norm.weight.data_ptr() if norm is not None else 0 for norm in norms]
    norm_dtype = DTYPES[norms[0].weight.dtype] if norms[0] is not None else 0
    eps = next((getattr(norms[0], name) for name in ("variance_epsilon", "eps") if hasattr(norms[0], name)), 0.0)
    of = native.Attention.make(*weights, heads, kv_heads, dim, module.scaling, *addresses, norm_dtype, eps)
    original, watch, config = module.forward, ModuleSnapshot([module]), module.config

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = room_in(kwargs.get("past_key_values"), index)
        angles = kwargs.get("position_embeddings")
        if (
            layer is None
            or angles is None
            or args
            or kwargs.get("attention_mask") is not None
            or kwargs.get("output_attentions")
            or hidden_states.numel() != size
            or hidden_states.dtype != torch.bfloat16
            or hidden_states.requires_grad
            or config._attn_implementation != "sdpa"
            or any(watch.hooks)
            or not watch.same()
        ):
            return original(hidden_states, *args, **kwargs)
        cos, sin = angles
        if cos.numel() != dim or cos.dtype != torch.bfloat16:
            return original(hidden_states, *args, **kwargs)
        past, keys, values = layer.reserve(1)
        out = torch.empty_like(hidden_states)
        native.attention(
            of, hidden_states.contiguous().data_ptr(), 1, cos.contiguous().data_ptr(), sin.contiguous().data_ptr(), keys.data_ptr(),
            values.data_ptr(), past, keys.shape[2], out.data_ptr(), exact, torch.get_num_threads(),
        )  # fmt: skip
        layer.extend(1)
        return out, None

    try:
        return (forward, of) if _attends_alike(original, forward, size, dim, index, generator) else None
    except Exception:  # an attention that wants other things
        return None


def room_in(cache: Any, index: int) -> RoomyLayer | None:
    """Layer ``index`` of ``cache``, if it is one of ours with one sequence of bf16 in it."""
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    return layer if type(layer) is RoomyLayer and layer.holds_one(torch.bfloat16) else None


def _attends_alike(original: Forward, forward: Forward, size: int, dim: int, index: int, generator: torch.Generator) -> bool:
    """Several tokens by the family's own forward, then one more by each of the two: the same output, the same keys and values."""
    x = (2 * torch.randn(1, _PROBE_TOKENS, size, generator=generator)).bfloat16()
    angles = 3 * torch.rand(1, _PROBE_TOKENS, dim // 2, generator=generator).repeat(1, 1, 2)
    results = []
    for attend in (original, forward):
        cache = DynamicCache()
        for step in (slice(None, -1), slice(-1, None)):
            cos, sin = angles[:, step].cos().bfloat16(), angles[:, step].sin().bfloat16()
            function = original if step.start is None else attend
            hidden = x[:, step].contiguous()
            out = function(hidden, position_embeddings=(cos, sin), attention_mask=None, past_key_values=cache)[0]
            make_room(cache, _PROBE_TOKENS)
        layer = cache.layers[index]
        results.append((out, layer.keys[:, :, -1:], layer.values[:, :, -1:]))
    return isinstance(room_in(cache, index), RoomyLayer) and all(is_near(a, b) for a, b in zip(*results, strict=True))
