"""From the previous tokens' experts of the same layer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fate_moe.memory.statistics import RoutingStatistics

if TYPE_CHECKING:
    import torch

__all__ = ["Temporal"]

LEAST = 0.02  # less likely experts are not named


class Temporal:
    """Names what was used lately and what usually follows the last token's experts (see statistics.RoutingStatistics).

    Of many tokens at once it says nothing: nearly every expert is used then.
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
        worth = np.minimum(self.statistics.expected_uses[layer][: self._sizes[layer]], 1)
        likely = np.flatnonzero(worth > LEAST)
        likely = likely[np.argsort(-worth[likely], kind="stable")]
        return list(zip(likely.tolist(), worth[likely].tolist(), strict=True))
