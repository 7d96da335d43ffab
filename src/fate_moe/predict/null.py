"""No prediction: every expert is read when its router has asked for it (load on demand)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["NoPrediction"]


class NoPrediction:
    """The null implementation of the Predictor seam."""

    gives_probabilities = True

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        pass

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        return []
