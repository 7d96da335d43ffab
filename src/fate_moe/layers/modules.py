"""RMS norms, gated MLPs and attention with rotary halves, each run by one call of the extension, for one token or many.

``plain.py`` says which modules these are. The family's own forward stays for everything else: masks, other caches, gradients, many
tokens where weights are not quantized. At load time each module is compared with it once: a module that differs keeps it, and a
warning says so.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.cache_utils import DynamicCache

from fate_moe.adapter.contract import is_experts
from fate_moe.adapter.families import ROUTER_NAMES
from fate_moe.adapter.kv_cache import make_room, room_for
from fate_moe.core import Patcher
from fate_moe.kernels.activations import find_activation
from fate_moe.kernels.cpu import SMALL
from fate_moe.kernels.gradients import flows, refuse_transforms
from fate_moe.kernels.native import BF16, DTYPES, native
from fate_moe.kernels.plain_layer import Attention, Mlp, Norm
from fate_moe.layers.dense import MAX_ROWS, QuantizedLinear
from fate_moe.layers.plain import attention_reasons, recognise_attention, recognise_mlp, recognise_norm
from fate_moe.layers.rows import batch_rows, contiguous_kv, padding_of
from fate_moe.layers.snapshot import ModuleSnapshot, StandIn
from fate_moe.switches import fuse

__all__ = [
    "MOST_FEW",
    "SmallWeight",
    "accelerate",
    "accelerated_by",
    "is_near",
    "takes_many",
    "takes_tokens",
    "warn_of_difference",
    "weight_of",
]

_log = logging.getLogger(__name__)

# Rows up to which the extension multiplies matrices that are not quantized, too: a batch gives the bits of its sequences alone.
MOST_FEW = 16
_PROBE_TOKENS = 6
_MOST_SPREAD = 4.0  # standard deviation of a query's scores in a trial
_NEAR = 0.02  # of the norm: int8 activations and bf16 roundings give 0.01, another rope or scaling more than 0.1

Forward = Callable[..., Any]


@torch.no_grad()
def accelerate(model: Any, exact: bool, patcher: Patcher) -> Counter[str]:
    """Let the extension run those of ``model``'s modules that are known and that it has kernels for; how many of each kind.

    ``exact``: quantized weights are multiplied with fp32 activations. Does nothing without the extension.
    """
    found: Counter[str] = Counter()
    if native is None or not fuse() or model.dtype not in (torch.float32, torch.bfloat16):
        return found
    inside_experts = {part for module in model.modules() if is_experts(module) for part in module.modules()}
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if module in inside_experts:
            continue
        kind, accelerated = _accelerated(name, module, model, exact, generator)
        if accelerated is not None:
            patcher.replace(module, "forward", accelerated)
            found[kind] += 1
        weight = module._parameters.get("weight")
        small = weight is not None and weight.dim() == 2 and weight.dtype == torch.bfloat16 and 0 < weight.numel() <= SMALL
        if small and (type(module) is nn.Linear or name.rpartition(".")[2] in ROUTER_NAMES):
            patcher.replace(module, "weight", SmallWeight.of(weight))
            found["small matrices"] += 1
    return found


def accelerated_by(module: nn.Module) -> Any:
    """What the forward that ``accelerate`` gave ``module`` is made of: a Norm, the extension's Mlp or Attention; or None."""
    forward = vars(module).get("forward")
    return forward.of if isinstance(forward, StandIn) else None


def _accelerated(name: str, module: nn.Module, model: Any, exact: bool, generator: torch.Generator) -> tuple[str, StandIn | None]:
    children = {child for child, _ in module.named_children()}
    weight = module._parameters.get("weight")
    if not children and weight is not None and weight.dim() == 1:
        norm = recognise_norm(module)
        return "norms", _norm(name, module, norm, model.dtype, generator) if isinstance(norm, Norm) else None
    if {"gate_proj", "up_proj", "down_proj"} <= children:
        mlp = recognise_mlp(module)
        return "MLPs", _mlp(name, module, mlp, model.dtype, exact, generator) if isinstance(mlp, Mlp) else None
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= children:
        attention = recognise_attention(module)
        if isinstance(attention, Attention) and model.dtype == torch.bfloat16 and not attention_reasons(attention):
            return "attentions", _attention(name, module, attention, exact, generator)
    return "", None


def warn_of_difference(name: str, difference: str) -> None:
    """Say that the known code at ``name`` does not give what ours gives: it keeps its own forward."""
    _log.warning("%s keeps its own forward: %s; please report this with the versions of torch and transformers", name, difference)


class SmallWeight(nn.Parameter):
    """A bf16 matrix that multiplies a few rows itself when torch's ``linear`` is called on it."""

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
                usable = args[1].data_ptr() == own.get("address") and not flows(args[1])
            few = x.dtype == torch.bfloat16 and x.numel() <= MAX_ROWS * cols and x.is_contiguous() and not x.requires_grad
            if few and usable:
                out, count = x.new_empty(*x.shape[:-1], own["rows"]), x.numel() // cols
                native.linear(own["place"], own["address"], BF16, x.data_ptr(), 1, count, out.data_ptr(), 1, True, 1)
                return out
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _usable(x: torch.Tensor) -> bool:
    """Whether ``x`` [..., cols] is something for the extension."""
    refuse_transforms()
    return x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous() and not x.requires_grad and x.numel() > 0


def takes_many(layers: Sequence[Any], exact: bool) -> bool:
    """Whether the extension is to multiply many rows by ``layers``: their large matrices are quantized, activations not exact."""
    return not exact and all(isinstance(layer, QuantizedLinear) or layer.weight.numel() <= SMALL for layer in layers)


def is_near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two ways to compute the same thing may have given these."""
    return bool((got.float() - want.float()).norm() <= _NEAR * want.float().norm()) and bool(want.abs().max() > 0)


def _difference(got: torch.Tensor, want: torch.Tensor) -> str:
    distance = float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))
    return f"the kernel's result differs from it by {distance:.1%} of its norm"


class _Norm(StandIn):
    def __init__(self, module: nn.Module, weight: nn.Parameter, norm: Norm) -> None:
        self.original, self.of = module.forward, norm
        self._size, self._weight, self._snapshot = len(weight), (weight.data_ptr(), DTYPES[weight.dtype]), ModuleSnapshot([module])

    def __call__(self, x: torch.Tensor) -> Any:
        size = self._size
        many = x.dtype == torch.float32 and x.numel() > MAX_ROWS * size  # nothing else of many rows is ours in fp32
        if many or not _usable(x) or not self._snapshot.same():
            return self.original(x)
        out = torch.empty_like(x)
        native.rms_norm(
            x.data_ptr(), DTYPES[x.dtype], x.numel() // size, size, *self._weight, self.of.eps, self.of.rounds_first,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out


def _norm(name: str, module: nn.Module, norm: Norm, dtype: torch.dtype, generator: torch.Generator) -> StandIn | None:
    weight = module._parameters["weight"]
    if weight is None or weight.dtype not in DTYPES:
        return None
    forward = _Norm(module, weight, norm)
    for scale in (1e-3, 1.0, 30.0):  # a small one, where eps matters
        x = (scale * torch.randn(3, len(weight), generator=generator)).to(dtype)
        want, got = forward.original(x), forward(x)
        if want.dtype != got.dtype:  # its weight is of another dtype than the model: the kernel gives the input's
            return None
        if (got.float() - want.float()).abs().max() > 4 * torch.finfo(dtype).eps * want.abs().max():
            warn_of_difference(name, _difference(got, want))
            return None
    return forward


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


class _Activation:
    """An MLP's activation as ``find_activation`` reads it off experts."""

    has_gate = True

    def __init__(self, act: Any, limit: float | None) -> None:
        self.act_fn, self.limit = act, limit

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return torch.as_tensor(self.act_fn(gate) * up)


class _Mlp(StandIn):
    def __init__(self, module: nn.Module, of: Any, size: int, exact: bool, many: bool) -> None:
        self.original, self.of, self._size, self._exact = module.forward, of, size, exact
        self._most = size * MAX_ROWS if not many else sys.maxsize
        self._snapshot = ModuleSnapshot([module])

    def __call__(self, x: torch.Tensor) -> Any:
        if not _usable(x) or x.numel() > self._most or self._snapshot.hooked() or not self._snapshot.same():
            return self.original(x)
        out, num_rows = torch.empty_like(x), x.numel() // self._size
        native.mlp(self.of, x.data_ptr(), DTYPES[x.dtype], num_rows, out.data_ptr(), self._exact, torch.get_num_threads())
        return out


def _mlp(name: str, module: Any, mlp: Mlp, dtype: torch.dtype, exact: bool, generator: torch.Generator) -> StandIn | None:
    parts = [getattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")]
    weights = [weight_of(part) for part in parts]
    if any(weight is None for weight in weights):
        return None
    activation = find_activation(_Activation(module.act_fn, mlp.limit))
    if activation is None:
        return None
    size = module.gate_proj.in_features
    if module.down_proj.out_features != size or module.up_proj.in_features != size:
        return None
    forward = _Mlp(module, native.Mlp.make(*weights, activation), size, exact, takes_many(parts, exact))
    x = torch.randn(2, size, generator=generator).to(dtype)
    got, want = forward(x), forward.original(x)
    if not is_near(got, want):
        warn_of_difference(name, _difference(got, want))
        return None
    return forward


class _Attention(StandIn):
    def __init__(self, module: Any, of: Any, attention: Attention, exact: bool, many: bool) -> None:
        self.original, self.of, self._config = module.forward, of, module.config
        self._size, self._attention, self._exact, self._many = module.q_proj.in_features, attention, exact, many
        self._snapshot = ModuleSnapshot([module])

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x, angles, attention = hidden_states, kwargs.get("position_embeddings"), self._attention
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
        room = room_for(kwargs.get("past_key_values"), attention.index, attention.kv_heads, attention.head_dim, batch)
        past = room.get_seq_length() if room is not None else 0
        padding = padding_of(kwargs.get("attention_mask"), batch, count, past) if room is not None else None
        rows = batch_rows(batch, count, past, padding) if padding is not None else None
        if rows is None or room is None:
            return self.original(hidden_states, *args, **kwargs)
        kv = native.Kv.make(*contiguous_kv(*room.reserve(count)[1:]))
        hidden, cos, sin = rows.pick(x), rows.pick(angles[0]), rows.pick(angles[1])
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
        and angles[0].dtype == torch.bfloat16
        and angles[0].shape[1:] == (x.shape[1], attention.rotary_dim)
        and len(angles[0]) in (1, len(x))
    )


def _attention(name: str, module: Any, attention: Attention, exact: bool, generator: torch.Generator) -> StandIn | None:
    parts = [getattr(module, part) for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    weights = [weight_of(part) for part in parts]
    dim, index = attention.head_dim, attention.index
    config = module.config
    if any(weight is None for weight in weights) or getattr(config, "_attn_implementation", "") != "sdpa" or index < 0:
        return None
    norms = [module.q_norm, module.k_norm] if attention.qk_norm is not None else []
    if any(norm.weight.dtype not in DTYPES for norm in norms):
        return None
    addresses, norm_dtype = [norm.weight.data_ptr() for norm in norms] or [0, 0], DTYPES[norms[0].weight.dtype] if norms else 0
    eps = attention.qk_norm.eps if attention.qk_norm is not None else 0.0
    of = native.Attention.make(
        *weights, attention.heads, attention.kv_heads, dim, attention.rotary_dim, attention.scaling, *addresses, norm_dtype, eps,
        attention.norm_over_heads, attention.clip or 0.0, attention.window or 0,
    )  # fmt: skip
    forward = _Attention(module, of, attention, exact, takes_many(parts, exact))
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
    x = (2 * torch.randn(1, _PROBE_TOKENS, module.q_proj.in_features, generator=generator)).bfloat16()
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
    angles = 3 * torch.rand(1, _PROBE_TOKENS, attention.rotary_dim // 2, generator=generator).repeat(1, 1, 2)
    results = []
    for attend in (original, forward):
        cache = DynamicCache()
        for step in (slice(None, -1), slice(-1, None)):
            cos, sin = angles[:, step].cos().bfloat16(), angles[:, step].sin().bfloat16()
            function = original if step.start is None else attend
            hidden = x[:, step].contiguous()
            out = function(hidden, position_embeddings=(cos, sin), attention_mask=None, past_key_values=cache)[0]
            make_room(cache, _PROBE_TOKENS)
        layer = cache.layers[attention.index]
        results.append((out, layer.keys[:, :, -1:], layer.values[:, :, -1:]))
    return next((_difference(got, want) for want, got in zip(*results, strict=True) if not is_near(got, want)), None)
