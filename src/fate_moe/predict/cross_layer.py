"""Fate's cross-layer prediction (arXiv 2502.12224, section 3): the next layer's router, applied one layer early."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fate_moe.core import Routing

__all__ = ["CrossLayerRouter"]

# Besides the predicted top-k, experts above this quantile of the predicted confidence are predicted too (the paper's confidence
# rule). Of 60 experts these are the 15 likeliest.
CONFIDENCE_QUANTILE = 0.75


class CrossLayerRouter:
    """Applies the router of layer l to the router input of layer l - 1, or further back: neighbouring router inputs are similar.

    ``routers[l]`` routes hidden states [num_tokens, hidden]; None for a layer whose router cannot be called early, which then gets
    no prediction. Layer 0 has no predecessor and no prediction; the shallow-favouring policy keeps its experts resident instead.
    """

    gives_probabilities = False

    def __init__(self, routers: Sequence[Callable[[torch.Tensor], Routing] | None]) -> None:
        self._routers = routers

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        pass

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        """The predicted top-k of every token, most votes first, then the rest of the most confident quarter.

        The probability is that at least one of the tokens chooses the expert.
        """
        route = self._routers[layer]
        if layer < ahead or route is None:
            return []
        routing = route(router_input)
        chosen_by_token = routing.scores.float().softmax(-1)  # [num_tokens, num_experts]
        chosen = 1 - (1 - chosen_by_token).clamp_min(0).prod(0)  # [num_experts]
        num_experts = chosen.numel()
        votes = torch.bincount(routing.experts.reshape(-1), minlength=num_experts)[:num_experts]
        order = torch.argsort(votes + chosen, descending=True).tolist()  # votes are integers, probabilities break ties
        num_voted = int((votes > 0).sum())
        num_confident = num_experts - int(CONFIDENCE_QUANTILE * num_experts)
        probability = chosen.tolist()
        return [(expert, probability[expert]) for expert in order[: max(num_voted, num_confident)]]
