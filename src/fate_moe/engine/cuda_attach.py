"""The transformers adapter of the GPU tier: one experts function for all families, as a custom operator that a graph can
capture."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fate_moe.adapter.families import ROUTER_NAMES
from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.core import Patcher
from fate_moe.engine.attach import use_experts_function
from fate_moe.errors import ConfigError
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.kernels.gradients import flows, refuse_transforms
from fate_moe.layers.frozen import freeze_experts

__all__ = ["attach_device", "router_weights"]

_IMPLEMENTATION = "fate-device"
_numbers = itertools.count()
_attached: weakref.WeakValueDictionary[int, DeviceExperts] = weakref.WeakValueDictionary()


@torch.library.custom_op("fate_moe::device_experts", mutates_args=())
def _device_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, number: int, layer: int) -> torch.Tensor:
    """Operators take tensors and numbers alone, so the experts go by number."""
    return _attached[number].compute(layer, hidden, index, weights)


@_device_experts.register_fake
def _(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, number: int, layer: int) -> torch.Tensor:
    return torch.empty_like(hidden)


def _experts_forward(experts: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    refuse_transforms()
    if flows(hidden_states, weights):
        raise ConfigError("experts on a GPU give no gradients; train on the CPU (without vram), or generate under torch.no_grad()")
    result: torch.Tensor = torch.ops.fate_moe.device_experts(hidden_states, index, weights, experts.fate_number, experts.fate_layer)
    return result


ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION] = _experts_forward


def attach_device(model: Any, stacks: Sequence[ExpertStack], experts: DeviceExperts, patcher: Patcher) -> None:
    """Let ``model`` run its experts through ``experts``, which must outlive it. Their own parameters stay on the meta device."""
    use_experts_function(model, _IMPLEMENTATION, patcher)
    number = next(_numbers)
    _attached[number] = experts
    for stack in stacks:
        module = model.get_submodule(stack.name)
        patcher.replace(module, "fate_number", number)
        patcher.replace(module, "fate_layer", stack.layer)
        freeze_experts(module, patcher)


def router_weights(model: Any, stacks: Sequence[ExpertStack]) -> list[torch.Tensor | None]:
    """Each layer's router weight [num_experts, hidden], by which it can be predicted; None where its router has none of that
    shape."""
    gates: list[torch.Tensor | None] = []
    for stack in stacks:
        block = model.get_submodule(stack.block)
        router = next((child for name, child in block.named_children() if name in ROUTER_NAMES), nn.Module())
        shapes = [value for value in router.parameters() if value.ndim == 2 and value.shape[0] == stack.num_experts]
        gates.append(shapes[0].data if len(shapes) == 1 else None)
    return gates
