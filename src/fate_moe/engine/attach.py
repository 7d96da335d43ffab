"""The transformers adapter: one forward for all families' experts, one pre-hook on each MoE block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.families import NOT_ENTERED, entrance, find_router
from fate_moe.adapter.kv_cache import make_room
from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.core import Patcher, Router
from fate_moe.errors import BudgetError
from fate_moe.layers.frozen import freeze_experts
from fate_moe.runtime import ExpertRuntime

__all__ = ["attach", "limit_context", "refuse_longer", "routers_of"]

_log = logging.getLogger(__name__)


def _experts_forward(experts: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A forward instead of the family's own, whatever ``set_experts_implementation`` chooses."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        runtime: ExpertRuntime = experts.fate_runtime
        return runtime.compute(experts.fate_layer, experts, hidden_states, top_k_index, top_k_weights)

    return forward


def routers_of(model: Any, stacks: Sequence[ExpertStack], patcher: Patcher) -> list[Router | None]:
    """How to ask each layer's router early; a layer whose router cannot be asked runs too, without look-ahead."""
    probe = torch.zeros(1, model.config.get_text_config().hidden_size, dtype=model.dtype)
    found = [find_router(model.get_submodule(stack.block), stack, probe, patcher) for stack in stacks]
    reasons = [f"{stack.block}: {why}" for stack, why in zip(stacks, found, strict=True) if isinstance(why, str)]
    if text := [reason for reason in reasons if not reason.endswith(NOT_ENTERED)]:
        _log.warning("%d of %d MoE blocks run without look-ahead (%s)", len(text), len(stacks), text[0])
    return [None if isinstance(route, str) else route for route in found]


def attach(model: Any, stacks: Sequence[ExpertStack], runtime: ExpertRuntime, patcher: Patcher) -> None:
    """Let ``model`` run its experts through ``runtime``. The experts' own parameters stay on the meta device."""
    for stack in stacks:
        for name in (stack.name, *stack.twins):
            experts = model.get_submodule(name)
            patcher.replace(experts, "fate_runtime", runtime)
            patcher.replace(experts, "fate_layer", stack.layer)
            patcher.replace(experts, "forward", _experts_forward(experts))
            freeze_experts(experts, patcher)
            block = entrance(model.get_submodule(name.rpartition(".")[0]))
            patcher.hook(block, "before", _entering(runtime, stack.layer), with_kwargs=True)
    if (embeddings := model.get_input_embeddings()) is not None:
        patcher.hook(embeddings, "after", _embedded(runtime))
    if isinstance(model.get_output_embeddings(), nn.Linear):
        patcher.hook(model.get_output_embeddings(), "before", _with_own_strides)


def _with_own_strides(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """generate() gives the LM head a slice [1, 1, H] with the strides of the whole prompt, for which oneDNN copies the weight into
    another layout: slow, and the head's size again in memory (torch 2.13)."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def _embedded(runtime: ExpertRuntime) -> Any:
    def embedded(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        runtime.embedded(output)

    return embedded


def _entering(runtime: ExpertRuntime, layer: int) -> Any:
    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runtime.enter(layer, args[0] if args else next(iter(kwargs.values())), block.training)

    return enter


def limit_context(model: Any, num_tokens: int, bytes_per_token: int, patcher: Patcher, kv_format: str = "bf16") -> None:
    """Refuse a forward pass that would need more KV cache than was set aside (``num_tokens`` over the whole batch); let the cache
    grow in place up to there, in ``kv_format``."""

    def limit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next((x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
        past = kwargs.get("past_key_values")
        if inputs is None:
            return
        make_room(past, num_tokens, unless_given=True, kv_format=kv_format)
        wanted = inputs.shape[0] * (inputs.shape[1] + (past.get_seq_length() if past is not None else 0))
        refuse_longer(wanted, num_tokens, bytes_per_token)

    patcher.hook(model, "before", limit, with_kwargs=True)


def refuse_longer(wanted: int, num_tokens: int, bytes_per_token: int) -> None:
    """Raise BudgetError if ``wanted`` tokens are more than the KV cache is set aside for."""
    if wanted > num_tokens:
        raise BudgetError(
            f"{wanted} tokens need more KV cache than the {num_tokens} set aside; load with context_length={wanted} or more "
            "(--context-length)",
            (wanted - num_tokens) * bytes_per_token,
        )
