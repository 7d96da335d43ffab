"""Turns scores into probabilities, learned online from the experts that were chosen. No torch except router inputs it passes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fate_moe.predict.blend import Blend
from fate_moe.predict.reliability import ScoreProbabilities

if TYPE_CHECKING:
    import torch

    from fate_moe.predict.gates import Scorer

__all__ = ["ExpectedUses", "ProbabilityPredictor"]

MIN_PROBABILITY = 0.05  # less likely experts are not predicted
# Initial weights of the other sources, relative to the scorer's.
HISTORY = 0.25  # of log(expected uses)
FORECAST = 0.2  # of a whole-token forecast

Floats = NDArray[np.float32]


class ExpectedUses(Protocol):
    """An object with each expert's expected uses per token (see statistics.RoutingStatistics)."""

    @property
    def expected_uses(self) -> Floats:
        """fp32 [L, E]."""
        ...


class ProbabilityPredictor:
    """A scorer's ranking, with probabilities learned online by layer and look-ahead.

    A probability is learned for a score's distance from the border between the k-th and the next score, in standard deviations of
    the token's scores, so logits and probabilities are treated alike. ``history`` and ``forecast`` (a scorer too), if given, are
    added to this distance with weights learned online (see predict.blend); they are used alone where the scorer has no scores.
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
        self.scorer = scorer
        self.forecast = forecast
        self.history = history
        self.sizes = list(experts_per_layer)
        self._num_layers = len(self.sizes)
        self.top_k = [min(top_k, size - 1) or 1 for size in self.sizes]
        self.look_ahead = look_ahead
        self._probabilities = ScoreProbabilities(self._num_layers * look_ahead, max(self.sizes))
        self._predicted: dict[int, NDArray[np.int8]] = {}  # bins of the experts' scores, by (look-ahead - 1) * layers + layer
        start = [1.0, *([HISTORY] if history is not None else []), *([FORECAST] if forecast is not None else [])]
        self._blend = Blend(self._num_layers * look_ahead, start)
        self._source_scores: dict[int, list[Floats]] = {}  # [E] by source, where every source had scores

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        one_token = len(routed) <= self.top_k[layer]
        for which in range(layer, self._num_layers * self.look_ahead, self._num_layers):
            bins, sources = self._predicted.pop(which, None), self._source_scores.pop(which, None)
            if bins is not None and one_token:
                self._probabilities.learn(which, bins, list(routed))
                if sources is not None and self._blend.is_due(which):
                    self._blend.learn(which, sources, routed)
        if one_token:
            self.scorer.observe(layer, routed)

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        if ahead > self.look_ahead or (ahead > 1 and len(router_input) > 1):
            return []
        scored = self.scorer.scores(layer, router_input, ahead)
        scores = None if scored is None else scored.float().numpy(force=True)
        far = None if self.forecast is None else self.forecast.scores(layer, router_input, ahead)
        if len(router_input) > 1:
            return [] if scores is None else self._predict_many(layer, scores)
        sources: dict[int, Floats] = {}  # [E] by source's index in the blend
        if scores is not None:
            sources[0] = self._distances(layer, scores)[0]
        if self.history is not None:
            uses = np.maximum(self.history.expected_uses[layer, : self.sizes[layer]], 0.0)
            sources[1] = np.log(uses + np.float32(0.01), dtype=np.float64).astype(np.float32) + np.float32(2)
        if far is not None:
            sources[len(self._blend.weights[0]) - 1] = self._distances(layer, far.numpy(force=True))[0]
        if not sources:
            return []
        which = (ahead - 1) * self._num_layers + layer
        distance = self._blended(which, sources)
        bins = self._predicted[which] = ScoreProbabilities.bins(distance)
        probabilities = self._probabilities.rates[which][bins]
        likely = (probabilities > MIN_PROBABILITY).nonzero()[0]
        likely = likely[(-distance[likely]).argsort(kind="stable")]  # probabilities do not decrease with distance
        return list(zip(likely.tolist(), np.minimum(probabilities[likely], 1).tolist(), strict=True))

    def _blended(self, which: int, sources: dict[int, Floats]) -> Floats:
        """[num_experts]: the weighted sum of the sources, which are saved for learning if none is missing."""
        (_, distance), *others = sources.items()
        weights = self._blend.weights[which]
        for source, other in others:
            if (weight := weights[source]) > 0:
                distance = distance + weight * other
        if others and len(sources) == len(weights):
            self._source_scores[which] = list(sources.values())
        return distance

    def _distances(self, layer: int, scores: Floats) -> Floats:
        """[num_tokens, num_experts]: distances from the border, in standard deviations."""
        k = self.top_k[layer]
        ordered = np.partition(scores, (-k - 1, -k), axis=1)
        border = 0.5 * (ordered[:, -k - 1] + ordered[:, -k])
        wide = scores.astype(np.float64)
        spread = np.sqrt(np.maximum((wide * wide).mean(1) - wide.mean(1) ** 2, 0.0)) + 1e-6
        return np.asarray((scores - border[:, None]) * (1 / spread).astype(np.float32)[:, None], np.float32)

    def _predict_many(self, layer: int, scores: Floats) -> list[tuple[int, float]]:
        """The probabilities that at least one of many tokens chooses each expert, from ``scores`` [num_tokens, num_experts]."""
        bins = ScoreProbabilities.bins(self._distances(layer, scores))
        votes = self._probabilities.rates[layer][bins].sum(0, dtype=np.float64)
        chances = (1 - np.exp(-votes)) * (1 - 1e-3) + 1e-3 * votes / (votes.max() + 1e-6)  # the second term breaks ties
        probabilities = chances.astype(np.float32)
        likely = (probabilities > MIN_PROBABILITY).nonzero()[0]
        likely = likely[(-probabilities[likely]).argsort(kind="stable")]
        return list(zip(likely.tolist(), np.clip(probabilities[likely], 0, 1).tolist(), strict=True))
