"""What this engine assumes of transformers' experts modules. A model that breaks a rule is refused with the rule's name:
when transformers renames something or adds a kind of experts, that is a sentence, never a wrong number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["broken_rule", "is_experts", "lookalikes"]

# What transformers' decorator leaves on a class of experts; by these they are found.
_MARKS = ("is_transposed", "_apply_gate")
_FLAGS = frozenset({"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"})
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds routed experts and runs them through transformers' interface."""
    return all(hasattr(module, mark) for mark in _MARKS)


def lookalikes(model: nn.Module) -> list[str]:
    """Modules that hold experts by their name and shapes, but lack what is_experts goes by: the reason why, one line each."""
    found: dict[type, str] = {}
    for path, module in model.named_modules():
        stacked = any(value.ndim == 3 for value in module.parameters(recurse=False))
        if stacked and "experts" in type(module).__name__.lower() and not is_experts(module):
            missing = ", ".join(mark for mark in _MARKS if not hasattr(module, mark))
            found.setdefault(type(module), f"{path} ({type(module).__name__}) has no {missing}")
    return list(found.values())


def broken_rule(experts: Iterable[tuple[str, Any]]) -> str | None:
    """The first rule that one of the ``experts`` (path, module) breaks, in words, or None."""
    if (said := _call()) != _ARGUMENTS:
        return f"an experts function takes ({', '.join(_ARGUMENTS)}); transformers calls it with ({', '.join(said)})"
    for path, module in experts:
        if missing := sorted(flag for flag in _FLAGS - {"has_post_expert_norm"} if not hasattr(module, flag)):
            return f"experts say what they are by {', '.join(sorted(_FLAGS))}; {path} lacks {', '.join(missing)}"
        said_more = {name for name, value in vars(module).items() if name.startswith(("has_", "is_")) and value is True}
        if unknown := sorted(said_more - _FLAGS):
            return f"experts are of a known kind; {path} says {', '.join(unknown)}, which this engine does not know"
        wanted = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
        allowed = wanted | {f"{name}_bias" for name in wanted}
        names = {name for name, _ in module.named_parameters(recurse=False)}
        if not wanted <= names <= allowed:
            return f"experts' parameters are {', '.join(sorted(wanted))} and their biases; {path} has {', '.join(sorted(names))}"
        if not module.has_gate and not hasattr(module, "act_fn"):
            return f"experts without a gate have act_fn; {path} has none"
    return None


def _call() -> tuple[str, ...]:
    """The arguments that transformers' own experts functions take after the module."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    signature = inspect.signature(ALL_EXPERTS_FUNCTIONS["batched_mm"])
    return tuple(name for name, value in signature.parameters.items() if value.default is value.empty)[1:]
