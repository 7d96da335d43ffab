"""Predicts from the experts that previous tokens used in the same layer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fate_moe.memory.statistics import RoutingStatistics

if TYPE_CHECKING:
    import torch

__all__ = ["Temporal"]

MIN_PROBABILITY = 0.02  # less likely experts are not predicted


class Temporal:
    """Predicts recently used experts and those that usually follow the last token's (see statistics.RoutingStatistics).

    No prediction for a pass of many tokens, which uses nearly every expert.
    """

    gives_probabilities = True

    def __init__(self, experts_per_layer: Sequence[int]) -> None:
        self.statistics = RoutingStatistics(experts_per_layer)
        self._sizes = list(experts_per_layer)

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        self.statistics.routed(layer, routed)

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        if router_input.shape[0] > 1:
            return []
        probabilities = np.minimum(self.statistics.expected_uses[layer][: self._sizes[layer]], 1)
        likely = np.flatnonzero(probabilities > MIN_PROBABILITY)
        likely = likely[np.argsort(-probabilities[likely], kind="stable")]
        return list(zip(likely.tolist(), probabilities[likely].tolist(), strict=True))
