"""The transformers adapter of the GPU tier: one forward for all families' experts, an operator that a graph can capture."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.families import ROUTER_NAMES
from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.core import Patcher
from fate_moe.errors import UnsupportedCallError
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.kernels.gradients import flows, refuse_transforms
from fate_moe.layers.frozen import freeze_experts

__all__ = ["attach_device", "router_weights"]

_numbers = itertools.count()
_attached: weakref.WeakValueDictionary[int, DeviceExperts] = weakref.WeakValueDictionary()


@torch.library.custom_op("fate_moe::device_experts", mutates_args=())
def _device_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, number: int, layer: int) -> torch.Tensor:
    """Operators take tensors and numbers alone, so the experts go by number."""
    return _attached[number].compute(layer, hidden, index, weights)


@_device_experts.register_fake
def _(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, number: int, layer: int) -> torch.Tensor:
    return torch.empty_like(hidden)


def _experts_forward(number: int, stack: ExpertStack) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        refuse_transforms()
        if flows(hidden_states, top_k_weights):
            raise UnsupportedCallError(
                "experts on a GPU give no gradients; train on the CPU (without vram), or generate under torch.no_grad()"
            )
        if top_k_index.shape[-1] != stack.top_k:  # tables and kernels have room for so many
            raise UnsupportedCallError(
                f"{stack.block} chose {top_k_index.shape[-1]} experts for a token instead of {stack.top_k}; on a GPU their number "
                "cannot change after loading: change it in the store's config.json, or load without vram and device"
            )
        result: torch.Tensor = torch.ops.fate_moe.device_experts(hidden_states, top_k_index, top_k_weights, number, stack.layer)
        return result

    return forward


def attach_device(model: Any, stacks: Sequence[ExpertStack], experts: DeviceExperts, patcher: Patcher) -> None:
    """Let ``model`` run its experts through ``experts``. Their own parameters stay on the meta device."""
    number = next(_numbers)
    _attached[number] = experts
    for stack in stacks:
        module = model.get_submodule(stack.name)
        patcher.replace(module, "fate_experts", experts)  # the operator finds it by number, weakly
        patcher.replace(module, "forward", _experts_forward(number, stack))
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
