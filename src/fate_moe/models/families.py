"""What differs between families, and the generic rule that covers most of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fate_moe.core import Routing
from fate_moe.runtime import Router

__all__ = ["find_router"]

# The names transformers' MoE blocks give their router.
ROUTER_NAMES = ("gate", "router", "wg")


def find_router(block: nn.Module, num_experts: int, top_k: int | None) -> Router | None:
    """How to ask the router of ``block`` about hidden states [num_tokens, hidden] before the block runs; None if nobody knows.

    Families return a router's parts in their own order, so they are told apart by what they are: the integer tensor is the expert
    index, the floating one with ``num_experts`` columns the scores. A plain Linear router returns scores alone: take their top-k.
    """
    router = next((child for name, child in block.named_children() if name in ROUTER_NAMES), None)
    if router is None:
        return None

    def route(hidden: torch.Tensor) -> Routing:
        with torch.no_grad():
            answer: Any = router(hidden)
        parts = [answer] if isinstance(answer, torch.Tensor) else [part for part in answer if isinstance(part, torch.Tensor)]
        flat = [part.reshape(-1, part.shape[-1]) for part in parts]
        scores = next(part for part in flat if part.is_floating_point() and part.shape[-1] == num_experts)
        index = next((part for part in flat if not part.is_floating_point()), None)
        if index is None:
            index = scores.topk(top_k or 1, dim=-1).indices
        return Routing(index, scores)

    return route
