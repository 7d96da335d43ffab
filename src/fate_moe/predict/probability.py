"""Scores made probabilities, learned online from what came true. No torch but the gate inputs it hands on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fate_moe.predict.blend import Blend
from fate_moe.predict.reliability import Calibration

if TYPE_CHECKING:
    import torch

    from fate_moe.predict.gates import Scorer

__all__ = ["ExpectedUses", "ProbabilityPredictor"]

LEAST = 0.05  # less likely experts are not named
# Weights beside the gate's score, until it is known better.
HISTORY = 0.25  # of log(expected uses)
FORECAST = 0.2  # of a whole-token forecast

Floats = NDArray[np.float32]


class ExpectedUses(Protocol):
    """Something that knows each expert's expected uses per token (statistics.RoutingStatistics)."""

    @property
    def expected_uses(self) -> Floats:
        """[L, E]."""
        ...


class ProbabilityPredictor:
    """A scorer's ranking with probabilities that are learned online, by layer and look-ahead.

    What is calibrated is a score's distance from the border between the k-th and the next one, in standard deviations of the
    token's scores: the same whether a router speaks in logits or probabilities. ``history`` and ``forecast`` (a scorer too) are
    added to it where they are given, each with the weight that it proves to be worth (predict.blend); they stand in where the
    scorer is silent.
    """

    gives_probabilities = True

    def __init__(
        self,
        scorer: Scorer,
        experts_per_layer: Sequence[int],
        top_k: int,
        *,
        look_ahead: int = 1,
        history: ExpectedUses | None = None,
        forecast: Scorer | None = None,
    ) -> None:
        self._scorer = scorer
        self._forecast = forecast
        self._history = history
        self._sizes = list(experts_per_layer)
        self._num_layers = len(self._sizes)
        self._top_k = [min(top_k, size - 1) or 1 for size in self._sizes]
        self._look_ahead = look_ahead
        self._calibration = Calibration(self._num_layers * look_ahead, max(self._sizes))
        self._predicted: dict[int, NDArray[np.int8]] = {}  # the experts' bins, by (look-ahead - 1) * layers + layer
        start = [1.0, *([HISTORY] if history is not None else []), *([FORECAST] if forecast is not None else [])]
        self._blend = Blend(self._num_layers * look_ahead, start)
        self._said: dict[int, list[Floats]] = {}  # what the sources said, [E] each, where all of them did and it is studied

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        one_token = len(routed) <= self._top_k[layer]
        for which in range(layer, self._num_layers * self._look_ahead, self._num_layers):
            bins, said = self._predicted.pop(which, None), self._said.pop(which, None)
            if bins is not None and one_token:
                self._calibration.learn(which, bins, list(routed))
                if said is not None and self._blend.studies(which):
                    self._blend.learn(which, said, routed)
        if one_token:
            self._scorer.observe(layer, routed)

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        if ahead > self._look_ahead or (ahead > 1 and len(router_input) > 1):
            return []
        scored = self._scorer.scores(layer, router_input, ahead)
        scores = None if scored is None else scored.numpy(force=True).astype(np.float32, copy=False)
        far = None if self._forecast is None else self._forecast.scores(layer, router_input, ahead)
        if len(router_input) > 1:
            return [] if scores is None else self._of_many(layer, scores)
        said: dict[int, Floats] = {}  # [E] each, by place in the blend
        if scores is not None:
            said[0] = self._distance(layer, scores[0])
        if self._history is not None:
            worth = np.maximum(self._history.expected_uses[layer, : self._sizes[layer]], 0.0)
            said[1] = np.log(worth + np.float32(0.01)) + np.float32(2)
        if far is not None:
            said[len(self._blend.weights[0]) - 1] = self._distance(layer, far.numpy(force=True)[0])
        if not said:
            return []
        which = (ahead - 1) * self._num_layers + layer
        distance = self._blended(which, said)
        bins = self._predicted[which] = Calibration.bins(distance)
        chances = self._calibration.rates[which][bins]
        likely = (chances > LEAST).nonzero()[0]
        likely = likely[(-distance[likely]).argsort(kind="stable")]  # chances never fall as distance grows
        return list(zip(likely.tolist(), np.minimum(chances[likely], 1).tolist(), strict=True))

    def _blended(self, which: int, said: dict[int, Floats]) -> Floats:
        """[num_experts]: what the sources say together; kept to be studied where all of them spoke."""
        (_, distance), *others = said.items()
        weights = self._blend.weights[which]
        for source, other in others:
            if (weight := weights[source]) > 0:
                distance = distance + weight * other
        if others and len(said) == len(weights):
            self._said[which] = list(said.values())
        return distance

    def _distance(self, layer: int, scores: Floats) -> Floats:
        """[num_experts]: from the border, in standard deviations."""
        k = self._top_k[layer]
        ordered = np.sort(scores)
        border = 0.5 * (ordered[-k] + ordered[-k - 1])
        mean = scores.sum() / len(scores)
        spread = np.sqrt(max(float(scores.dot(scores)) / len(scores) - mean * mean, 0.0)) + 1e-6
        return np.asarray((scores - border) * np.float32(1 / spread), np.float32)

    def _of_many(self, layer: int, scores: Floats) -> list[tuple[int, float]]:
        """That at least one of the tokens chooses the expert; the more tokens expect it, the likelier."""
        k = self._top_k[layer]
        ordered = np.partition(scores, (-k - 1, -k), axis=1)
        border = 0.5 * (ordered[:, -k - 1] + ordered[:, -k])
        distance = np.asarray((scores - border[:, None]) / (scores.std(1, keepdims=True) + 1e-6), np.float32)
        votes = self._calibration.rates[layer][Calibration.bins(distance)].sum(0)
        chances = (1 - np.exp(-votes)) * (1 - 1e-3) + 1e-3 * votes / (votes.max() + 1e-6)
        likely = (chances > LEAST).nonzero()[0]
        likely = likely[(-chances[likely]).argsort(kind="stable")]
        return list(zip(likely.tolist(), np.clip(chances[likely], 0, 1).tolist(), strict=True))
