"""Methods of transformers' models that assume that all parameters are in memory: what each does on a loaded model.

Most are refused with a sentence. What changes nothing (``to`` the device where the model is) passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.contract import is_experts
from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.core import Patcher
from fate_moe.errors import UnsupportedCallError

__all__ = ["refuse_what_needs_parameters", "say_sizes"]

_SAVE = (
    "save_pretrained cannot write a loaded model: its experts are in the store. Copy the checkpoint that it was made from, or "
    "{store}, which can be loaded too; an adapter is saved by its own save_pretrained"
)
_CHANGE = "{what} would change parameters that are in the store, {store}; change the checkpoint with transformers and load that"
_COPY = (
    "a loaded model cannot be copied, pickled or sent to another process: load it there too; {store} is shared on the disk, and "
    "the system keeps one copy of what is read"
)


def refuse_what_needs_parameters(model: Any, stacks: Sequence[ExpertStack], store: Path, patcher: Patcher) -> None:
    """Replace such methods of ``model`` and, where they can be called there, of its parts that hold experts."""

    def refused(text: str, what: str = "") -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise UnsupportedCallError(text.format(store=store, what=what))

        return refuse

    for name in ("save_pretrained", "push_to_hub"):
        patcher.replace(model, name, _unless_adapter(model, getattr(model, name), refused(_SAVE)))
    for name in ("resize_token_embeddings", "init_weights", "initialize_weights", "share_memory"):
        patcher.replace(model, name, refused(_CHANGE, name))
    for name in ("_replicate_for_data_parallel", "__prepare_scriptable__"):
        patcher.replace(model, name, refused(_COPY))
    ours = set(model.modules())
    for module in _holders(model, stacks):
        patcher.replace(module, "_apply", _only_if_nothing_changes(module, model.dtype, model.device, ours))
        patcher.replace(module, "__getstate__", refused(_COPY))
        patcher.replace(module, "state_dict", _inner_state(model, module, refused(_SAVE.replace("save_pretrained", "state_dict"))))
        patcher.replace(module, "load_state_dict", _real_state(module, refused(_CHANGE, "load_state_dict")))


def say_sizes(model: Any, num_parameters: tuple[int, int], memory_bytes: int, patcher: Patcher) -> None:
    """Let the model's own methods count weights that are in the store too, and the memory that it takes.

    ``num_parameters``: with embeddings and without them.
    """
    count = model.num_parameters

    def counted(only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        return int(count(True, exclude_embeddings)) if only_trainable else num_parameters[exclude_embeddings]

    patcher.replace(model, "num_parameters", counted)
    patcher.replace(model, "get_memory_footprint", lambda return_buffers=True: memory_bytes)


def _holders(model: nn.Module, stacks: Sequence[ExpertStack]) -> list[nn.Module]:
    """The modules of ``model`` that contain experts, the experts' own modules last."""
    names = {""}
    for stack in stacks:
        for name in (stack.name, *stack.twins):
            parts = name.split(".")
            names |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return [model.get_submodule(name) for name in sorted(names, key=lambda name: (name.count(".") + bool(name), name))]


def _unless_adapter(model: Any, method: Callable[..., Any], refuse: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` where transformers has put an adapter into ``model``, which is what it saves then."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return (method if getattr(model, "_hf_peft_config_loaded", False) else refuse)(*args, **kwargs)

    return call


def _only_if_nothing_changes(
    module: nn.Module, dtype: torch.dtype, device: torch.device, ours: set[nn.Module]
) -> Callable[..., Any]:
    """``Module._apply``, behind ``to``, ``half`` and ``cuda``: parameters of the model's dtype must stay as they are. Modules that
    were added later (adapters) are converted."""

    def apply(function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        probe = torch.empty(0, dtype=dtype, device=device)
        try:
            same = function(probe) is probe
        except Exception:  # a device that this machine does not have
            same = False
        if not same:
            raise UnsupportedCallError(
                f"a loaded model stays in {dtype} on {device}: kernels work on its weights where they lie; for a GPU load it with "
                "device='cuda', for the CPU without device and vram, and for another dtype convert the checkpoint with transformers"
            )
        for part in module.modules() if recurse else ():
            if part not in ours:
                part._apply(function, recurse=False)  # type: ignore[no-untyped-call]
        return module

    return apply


def _inner_state(model: Any, module: nn.Module, refuse: Callable[..., Any]) -> Callable[..., Any]:
    """``state_dict`` as part of a larger one (an adapter's around the model), of which the adapter's tensors are taken."""
    method = module.state_dict

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        inner = args or kwargs.get("destination") is not None or getattr(model, "_hf_peft_config_loaded", False)
        return (method if inner else refuse)(*args, **kwargs)

    return state_dict


def _real_state(module: nn.Module, refuse: Callable[..., Any]) -> Callable[..., Any]:
    """``load_state_dict`` of parameters that are in memory as numbers."""
    method = module.load_state_dict

    def load_state_dict(state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        numbers = {name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.device.type != "meta"}
        stored = {name for name, part in module.named_modules() if is_experts(part) or not list(part.children())}
        if any(key not in numbers and key.rpartition(".")[0] in stored for key in state_dict):
            refuse()
        return method(state_dict, *args, **kwargs)

    return load_state_dict
