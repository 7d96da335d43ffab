"""Predictors that look at the gate input: the next router as it is, or a gate fitted to know better; with probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fate_moe.core import Routing
from fate_moe.predict.calibration import Calibration
from fate_moe.usage import Usage

__all__ = ["CalibratedGate", "FittedGates", "Scorer", "cloned_gate", "fitted_gate"]

LEAST = 0.05  # less likely experts are not named
HISTORY = 0.25  # weight of log(expected uses) beside the gate's score

Scorer = Callable[[int, torch.Tensor], torch.Tensor | None]
"""(layer, gate input [num_tokens, hidden] of the layer before) -> scores [num_tokens, num_experts], higher is likelier; or None."""


class FittedGates:
    """One affine map a layer, [E, D + 1] fp32, from the gate input of the layer before (layer 0: the embedding)."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.weights = list(weights)
        self._maps = [(weight[:, :-1].contiguous(), weight[:, -1].contiguous()) for weight in weights]

    def scores(self, layer: int, gate_input: torch.Tensor) -> torch.Tensor:
        """[num_tokens, num_experts]: about the probability of each expert being chosen."""
        weight, bias = self._maps[layer]
        return torch.addmm(bias, gate_input.float(), weight.mT)


def fitted_gate(gates: FittedGates) -> Scorer:
    """Scores by gates that were fitted on this model's own routing (`fate fit`)."""
    return gates.scores


def cloned_gate(routers: Sequence[Callable[[torch.Tensor], Routing] | None]) -> Scorer:
    """Scores by the layer's own router, on the gate input of the layer before (Fate). Layer 0 has none."""

    def score(layer: int, gate_input: torch.Tensor) -> torch.Tensor | None:
        route = routers[layer]
        return None if layer == 0 or route is None else route(gate_input).scores

    return score


class CalibratedGate:
    """A scorer's ranking with probabilities that are learned online, by layer; with ``history``, recent uses count too.

    What is calibrated is a score's distance from the border between the k-th and the next one, in standard deviations of the
    token's scores: the same whether a router speaks in logits or probabilities.
    """

    calibrated = True

    def __init__(self, scorer: Scorer, experts_per_layer: Sequence[int], top_k: int, *, history: bool = False) -> None:
        self._scorer = scorer
        self._top_k = top_k
        self._sizes = list(experts_per_layer)
        self._usage = Usage(experts_per_layer, co_activation=False) if history else None
        self._calibration = Calibration(len(self._sizes))
        self._predicted: dict[int, NDArray[np.intp]] = {}  # by layer: the experts' bins

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        bins = self._predicted.pop(layer, None)
        if bins is not None and len(routed) <= self._top_k:
            self._calibration.learn(layer, bins, list(routed))
        if self._usage is not None and len(routed) <= self._top_k:
            self._usage.routed(layer, routed)

    def predict(self, layer: int, gate_input: torch.Tensor) -> list[tuple[int, float]]:
        scored = self._scorer(layer, gate_input)
        scores = None if scored is None else scored.float().numpy(force=True)
        if scores is None and (self._usage is None or len(gate_input) > 1):
            return []
        if scores is not None and len(scores) > 1:
            chances = self._of_many(layer, scores)
        else:
            distance = np.zeros(self._sizes[layer], np.float32) if scores is None else self._distance(scores)[0]
            if self._usage is not None:
                worth = self._usage.worth[layer][: self._sizes[layer]]
                distance = distance + HISTORY * np.log(worth + 0.01) + (0.5 if scores is not None else 0)
            bins = self._predicted[layer] = self._calibration.bins(distance)
            chances = self._calibration.probabilities(layer, bins) + 1e-3 * np.clip(distance / 4, -0.5, 0.5)  # ties in a bin
        likely = np.flatnonzero(chances > LEAST)
        likely = likely[np.argsort(-chances[likely], kind="stable")]
        return list(zip(likely.tolist(), np.clip(chances[likely], 0, 1).tolist(), strict=True))

    def _distance(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """[num_tokens, num_experts]: from the border, in standard deviations."""
        num_experts = scores.shape[1]
        k = min(self._top_k, num_experts - 1) or 1
        ordered = np.partition(scores, (num_experts - k - 1, num_experts - k), axis=1)
        border = 0.5 * (ordered[:, num_experts - k - 1] + ordered[:, num_experts - k])
        return np.asarray((scores - border[:, None]) / (scores.std(1, keepdims=True) + 1e-6), np.float32)

    def _of_many(self, layer: int, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """[num_experts]: that at least one of the tokens chooses the expert; the more tokens expect it, the likelier."""
        each = self._calibration.probabilities(layer, self._calibration.bins(self._distance(scores)))
        votes = each.sum(0)
        return np.asarray((1 - np.exp(-votes)) * (1 - 1e-3) + 1e-3 * votes / (votes.max() + 1e-6), np.float32)
