"""Whether modules are still what a forward of ours was made from; people change modules after loading."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fate_moe.adapter.contract import is_experts
from fate_moe.kernels.native import native
from fate_moe.layers.frozen import FrozenWeight

__all__ = ["ModuleSnapshot", "StandIn", "Watch"]

_GLOBAL_HOOKS = [
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
]
_NO_SETTINGS = {"gradient_checkpointing"}  # its modules see to it themselves


class StandIn:
    """A forward of ours in place of a module's ``original``; ``of`` is what the extension knows of the module.

    A copy of the module gets the original back: ours has the addresses of the numbers that it was made from.
    """

    original: Callable[..., Any]
    of: Any

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.original, memo)


class ModuleSnapshot:
    """Modules and the modules in them, as they were found: adapters replace parts, hooks want the family's own forward, people set
    attributes, train weights and put forwards of their own, and ``model.to`` moves numbers away from the addresses that the
    extension was given."""

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        """Hooks on ``owners`` do not count, unless one is in another: torch calls them around the forward that is replaced."""
        places = [(owner._modules, name) for owner in owners for name, _ in owner.named_children()]
        parts = list(dict.fromkeys(part for owner in owners for part in owner.children()))
        self._hooks: list[Any] = list(_GLOBAL_HOOKS)
        for part in parts:
            self._hooks += [part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks]
        self._counts = list(map(len, self._hooks))  # some are ours
        modules = list(dict.fromkeys([*owners, *parts]))
        self._numbers = [
            (held, name, tensor, _address(tensor))
            for part in modules
            if not is_experts(part)
            for held in (part._parameters, part._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self._code = [(part, type(part), type(part).forward) for part in modules]
        forwards = [(vars(part), "forward") for part in parts]
        settings = [(vars(module), name) for module in modules for name in _settings(module)]
        self._where: list[tuple[dict[str, Any], str]] = [*places, *forwards, *settings]
        self._found = [held.get(name) for held, name in self._where]
        configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
        self._implementations = [(config, config._attn_implementation) for config in configs.values()]

    def is_trained(self) -> bool:
        """Whether gradients are computed for one of the numbers."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for _, _, tensor, _ in self._numbers)

    def hooked(self) -> bool:
        """Whether somebody hooked one of the parts since; transformers does in the midst of a pass, to record outputs."""
        return list(map(len, self._hooks)) != self._counts

    def same(self) -> bool:
        """Whether all parts, their code, settings and numbers are what and where they were, and none is being trained."""
        with torch._C.DisableTorchFunctionSubclass():
            for held, name, tensor, at in self._numbers:
                if held.get(name) is not tensor or (at is not None and tensor.data_ptr() != at):
                    return False
            if self.is_trained():
                return False
        return (
            [held.get(name) for held, name in self._where] == self._found
            and all(part.__class__ is kind and kind.forward is forward for part, kind, forward in self._code)
            and all(config._attn_implementation == said for config, said in self._implementations)
        )


class Watch:
    """Several snapshots asked at once, by the extension: whether all are the same and nobody hooked one of their parts."""

    def __init__(self, snapshots: Sequence[ModuleSnapshot]) -> None:
        self._snapshots = snapshots
        places = [(*where, found) for one in snapshots for where, found in zip(one._where, one._found, strict=True)]
        sizes = [(hooks, count) for one in snapshots for hooks, count in zip(one._hooks, one._counts, strict=True)]
        numbers = [(*place, at or 0) for one in snapshots for *place, at in one._numbers]
        code = [entry for one in snapshots for entry in one._code]
        self._native = native.Watch.make(
            list({(id(held), name): (held, name, found) for held, name, found in places}.values()),
            list({(id(held), name): (held, name, *others) for held, name, *others in numbers}.values()),
            list({id(hooks): (hooks, count) for hooks, count in sizes}.values()),
            list({id(part): (part, kind) for part, kind, _ in code}.values()),
            list({id(kind): (kind, forward) for _, kind, forward in code}.values()),
        )
        self._implementations = {id(config): (config, said) for one in snapshots for config, said in one._implementations}

    def same(self) -> bool:
        """Whether nothing was changed, hooked or is being trained since."""
        with torch._C.DisableTorchFunctionSubclass():
            return (
                self._native.same()
                and all(config._attn_implementation == said for config, said in self._implementations.values())
                and not (torch.is_grad_enabled() and any(one.is_trained() for one in self._snapshots))
            )


def _address(tensor: torch.Tensor) -> int | None:
    """Where its numbers are, if they are in memory. Asked once: telling kinds of parameters apart takes longer than the address."""
    return None if isinstance(tensor, FrozenWeight) else tensor.data_ptr()


def _settings(module: nn.Module) -> list[str]:
    """Names of the attributes that forwards read: numbers, flags and names."""
    return [
        name
        for name, value in vars(module).items()
        if name[0] != "_" and name not in _NO_SETTINGS and isinstance(value, bool | int | float | str | None)
    ]
