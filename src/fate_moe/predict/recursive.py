"""Improves the routers' early scores while the model runs, by recursive least squares; for models without fitted gates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fate_moe.predict.gates import Scorer

__all__ = ["RecursiveRouters"]

Floats = NDArray[np.float32]

# The weight of the routers' own scores, in tokens: the correction has an effect after about as many tokens.
PRIOR = 1000.0
SLOPE = 0.15  # a router's standardized score in units of probability
DECAY = 0.995  # per token, of the recall of both


class RecursiveRouters(Scorer):
    """Corrects the ``routers``' scores of a layer by an affine map of all of them, [E + 1] -> [E], by layer and look-ahead.

    The map is fitted to the chosen experts by least squares, updated token by token (Plackett, Biometrika 1950) at O(E^2) in the
    space of the scores; in the space of the router inputs, O(D^2), an update costs more than it saves. It starts with the routers'
    ranking. It replaces the routers' scores of a layer only while its recent recall at k is higher than theirs, and never for a
    pass of many tokens.
    """

    def __init__(self, routers: Scorer, experts_per_layer: Sequence[int]) -> None:
        self._routers = routers
        self._sizes = list(experts_per_layer)
        self._maps: dict[tuple[int, int], tuple[Floats, Floats]] = {}  # by (layer, ahead): inverse covariance, weights
        self._recall: dict[tuple[int, int], list[float]] = {}  # of the routers and of the map, decayed averages
        self._pending: dict[tuple[int, int], tuple[Floats, Floats]] = {}  # features [E + 1], corrected scores [E]

    def scores(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        scored = self._routers.scores(layer, router_input, ahead)
        if scored is None or len(scored) > 1:
            return scored
        row = scored[0].float().numpy(force=True)
        features = np.append((row - row.mean()) / (row.std() + 1e-6), np.float32(1))
        key = (layer, ahead)
        if key not in self._maps:
            size = len(row)
            start = np.concatenate([SLOPE * np.eye(size, dtype=np.float32), np.zeros((1, size), np.float32)])
            self._maps[key] = (np.eye(size + 1, dtype=np.float32) / PRIOR, start)
            self._recall[key] = [0.0, 0.0]
        corrected = features @ self._maps[key][1]
        self._pending[key] = features, corrected
        router_recall, map_recall = self._recall[key]
        return torch.from_numpy(corrected)[None] if map_recall > router_recall else scored

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        chosen, k = list(routed), len(routed)
        for key in [key for key in self._pending if key[0] == layer]:
            features, corrected = self._pending.pop(key)
            if k >= len(corrected):
                continue
            inverse, weights = self._maps[key]
            for index, scores in enumerate((features[:-1], corrected)):
                recall = float((scores[chosen] >= np.partition(scores, -k)[-k]).mean())
                self._recall[key][index] = DECAY * self._recall[key][index] + (1 - DECAY) * recall
            error = -corrected
            error[chosen] += 1
            projected = inverse @ features
            gain = projected / (1 + float(features @ projected))
            inverse -= np.outer(gain, projected)
            weights += np.outer(gain, error)
