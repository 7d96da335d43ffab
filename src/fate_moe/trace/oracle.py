"""The bound that no predictor can beat: what a trace will choose. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fate_moe.trace.schema import RoutingTrace

if TYPE_CHECKING:
    import torch

__all__ = ["Oracle"]


class Oracle:
    """Names exactly what each layer of one trace will choose; what is not ready then, no predictor over the same link and so many
    layers ahead could have made ready. ``observe`` must follow the trace from its beginning."""

    gives_probabilities = False  # sure, and never given up by a trial

    def __init__(self, trace: RoutingTrace) -> None:
        self._experts = trace.experts.tolist()
        self._token = 0

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        self._token += layer == len(self._experts[0]) - 1

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        return [(expert, 1.0) for expert in self._experts[self._token][layer]]
