"""Fits gates that know the next layer's choice better than its own router does: ridge regression on the model's own routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fate_moe.core import ExpertId, Lookup

__all__ = ["GateFitter", "recall"]

RIDGE = 3e-3  # of the inputs' mean square; between 1e-3 and 1e-2 recall differs by less than 0.1 points


@dataclass
class GateFitter:
    """Watches passes of many tokens (runtime.observer) and sums up what ridge regression needs: nothing is kept per token.

    Layer l's target is which experts each token chose, its input the gate input of layer l - 1, for layer 0 the embedding. Memory:
    (hidden + 1)^2 + (hidden + 1) * experts floats a layer. With ``testing`` set, passes are kept instead of learned from.
    """

    experts_per_layer: Sequence[int]
    hidden: int
    testing: bool = False
    inputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # of the test passes, by layer
    chosen: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.hidden + 1
        self._squares = [torch.zeros(size, size) for _ in self.experts_per_layer]
        self._products = [torch.zeros(size, num_experts) for num_experts in self.experts_per_layer]
        self._before: torch.Tensor | None = None
        self._here: torch.Tensor | None = None

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A pass begins."""
        self._here = embeddings

    def entered(self, layer: int, gate_input: torch.Tensor) -> None:
        """What predicts ``layer`` is what was seen before it."""
        self._before, self._here = self._here, gate_input

    def computed(
        self,
        layer: int,
        index: torch.Tensor,
        weights: torch.Tensor,
        lookups: dict[ExpertId, Lookup],
        stall_seconds: float,
        predicted: list[tuple[int, float]],
    ) -> None:
        """``index`` [num_tokens, k] is what it chose."""
        if self._before is None or self._before.shape[0] != index.shape[0]:
            return
        if self.testing:
            self.inputs.setdefault(layer, []).append(self._before.float())
            self.chosen.setdefault(layer, []).append(index)
            return
        x = torch.nn.functional.pad(self._before.float(), (0, 1), value=1.0)
        target = torch.zeros(index.shape[0], self.experts_per_layer[layer]).scatter_(1, index, 1.0)
        self._squares[layer].addmm_(x.mT, x)
        self._products[layer].addmm_(x.mT, target)

    def gates(self) -> list[torch.Tensor]:
        """One matrix [num_experts, hidden + 1] a layer. Raises ValueError where a layer was never seen."""
        solved = []
        for layer, (squares, products) in enumerate(zip(self._squares, self._products, strict=True)):
            mean_square = float(squares.diagonal().mean())
            if not mean_square:
                raise ValueError(f"MoE layer {layer} ran for no token")
            damped = squares.double() + RIDGE * mean_square * torch.eye(len(squares), dtype=torch.float64)
            solved.append(torch.linalg.solve(damped, products.double()).mT.float().contiguous())
        return solved


def recall(scores: torch.Tensor, chosen: torch.Tensor, width: int) -> float:
    """The share of ``chosen`` [N, k] among the ``width`` best of ``scores`` [N, E]."""
    guessed = scores.topk(min(width, scores.shape[1]), dim=-1).indices
    return float((chosen[:, :, None] == guessed[:, None, :]).any(-1).float().mean())
