"""RMS norms, gated MLPs and attention with rotary halves, each run by one call of the extension, for one token or many.

``plain.py`` says which modules these are. The family's own forward stays for everything else: masks, other caches, gradients, many
tokens where weights are not quantized. At load time each module is compared with it once: a module that differs keeps it, and a
warning says so.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.contract import is_experts
from fate_moe.adapter.families import ROUTER_NAMES
from fate_moe.core import Patcher
from fate_moe.kernels.activations import find_activation
from fate_moe.kernels.cpu import SMALL
from fate_moe.kernels.native import DTYPES, native
from fate_moe.kernels.plain_layer import Attention, Mlp, Norm
from fate_moe.layers.attentions import accelerated_attention
from fate_moe.layers.dense import MAX_ROWS
from fate_moe.layers.plain import recognise_attention, recognise_mlp, recognise_norm
from fate_moe.layers.reasons import attention_reasons
from fate_moe.layers.snapshot import ModuleSnapshot, StandIn
from fate_moe.layers.weights import (
    SmallWeight,
    difference_of,
    halves_of,
    is_near,
    native_norm,
    takes_many,
    usable,
    warn_of_difference,
    weight_of,
)
from fate_moe.switches import fuse

__all__ = ["accelerate", "accelerated_by", "matrices_of"]


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
    if {"gate_proj", "up_proj", "down_proj"} <= children or {"input_linear", "output_linear"} <= children:
        mlp = recognise_mlp(module)
        return "MLPs", _mlp(name, module, mlp, model.dtype, exact, generator) if isinstance(mlp, Mlp) else None
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= children or {"kv_b_proj", "kv_a_proj_with_mqa", "o_proj"} <= children:
        attention = recognise_attention(module)
        if isinstance(attention, Attention) and model.dtype == torch.bfloat16 and not attention_reasons(attention):
            return "attentions", accelerated_attention(name, module, attention, exact, generator)
    return "", None


class _Norm(StandIn):
    def __init__(self, module: nn.Module, weight: nn.Parameter, norm: Norm) -> None:
        self.original, self.of = module.forward, norm
        self._size, self._native, self._snapshot = len(weight), native_norm(module, norm), ModuleSnapshot([module])

    def __call__(self, x: torch.Tensor) -> Any:
        size = self._size
        many = x.dtype == torch.float32 and x.numel() > MAX_ROWS * size  # nothing else of many rows is ours in fp32
        if many or not usable(x) or not self._snapshot.same():
            return self.original(x)
        out = torch.empty_like(x)
        where = x.data_ptr(), DTYPES[x.dtype], x.numel() // size, size, out.data_ptr()
        native.norm(self._native, *where, torch.get_num_threads())
        return out


def _norm(name: str, module: nn.Module, norm: Norm, dtype: torch.dtype, generator: torch.Generator) -> StandIn | None:
    weight = module._parameters["weight"]
    if weight is None or weight.dtype not in DTYPES or (norm.bias and module.bias.dtype != weight.dtype):
        return None
    forward = _Norm(module, weight, norm)
    for scale in (1e-3, 1.0, 30.0):  # a small one, where eps matters
        x = (scale * torch.randn(3, len(weight), generator=generator)).to(dtype)
        want, got = forward.original(x), forward(x)
        if want.dtype != got.dtype:  # its weight is of another dtype than the model: the kernel gives the input's
            return None
        if (got.float() - want.float()).abs().max() > 4 * torch.finfo(dtype).eps * want.abs().max():
            warn_of_difference(name, difference_of(got, want))
            return None
    return forward


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
        if not usable(x) or x.numel() > self._most or self._snapshot.hooked() or not self._snapshot.same():
            return self.original(x)
        out, num_rows = torch.empty_like(x), x.numel() // self._size
        native.mlp(self.of, x.data_ptr(), DTYPES[x.dtype], num_rows, out.data_ptr(), self._exact, torch.get_num_threads())
        return out


def matrices_of(mlp: Any) -> list[Any]:
    """The linear layers of a gated MLP."""
    if hasattr(mlp, "input_linear"):
        return [mlp.input_linear, mlp.output_linear]
    return [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _mlp(name: str, module: Any, mlp: Mlp, dtype: torch.dtype, exact: bool, generator: torch.Generator) -> StandIn | None:
    parts = matrices_of(module)
    weights = [*halves_of(parts[0]), weight_of(parts[1])] if mlp.joined else [weight_of(part) for part in parts]
    if any(weight is None for weight in weights):
        return None
    activation = find_activation(_Activation(module.activation if mlp.joined else module.act_fn, mlp.limit))
    if activation is None:
        return None
    size = parts[0].in_features
    if parts[-1].out_features != size or parts[-2].in_features != size:
        return None
    forward = _Mlp(module, native.Mlp.make(*weights, activation), size, exact, takes_many(parts, exact))
    x = torch.randn(2, size, generator=generator).to(dtype)
    got, want = forward(x), forward.original(x)
    if not is_near(got, want):
        warn_of_difference(name, difference_of(got, want))
        return None
    return forward
