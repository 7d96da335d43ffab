"""The bound that no predictor can beat: what a trace will choose. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fate_moe.trace.schema import RoutingTrace

if TYPE_CHECKING:
    import torch

__all__ = ["Oracle"]


class Oracle:
    """Predicts exactly what each layer of one trace chooses: with the same link and look-ahead, no predictor has more experts ready
    on time. ``observe`` must follow the trace from its beginning."""

    gives_probabilities = False  # all of it is prefetched, and no trial turns it off

    def __init__(self, trace: RoutingTrace) -> None:
        self._experts = trace.experts.tolist()
        self._token = 0

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        self._token += layer == len(self._experts[0]) - 1

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        return [(expert, 1.0) for expert in self._experts[self._token][layer]]
