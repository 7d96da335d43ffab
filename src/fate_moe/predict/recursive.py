"""A gate that learns while the model runs, where none was fitted: recursive least squares on the routers' own early scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fate_moe.predict.gates import Scorer

__all__ = ["RecursiveRouters"]

Floats = NDArray[np.float32]

# The routers' scores count as so many observations of themselves: it takes some thousand tokens to know better than they do.
PRIOR = 1000.0
SLOPE = 0.15  # a router's standardized score in units of probability
MEMORY = 0.995  # per token, of who of the two was right lately


class RecursiveRouters(Scorer):
    """Corrects ``routers``' scores of a layer by an affine map of all of them, [E + 1] -> [E], one for each layer and look-ahead.

    Least squares towards what was chosen, updated token by token (Plackett, Biometrika 1950) at O(E^2): in the space of the scores,
    as the gate inputs' own (D^2, 4 million at 2048) costs more than it saves. Starts as the routers are, and speaks for a layer
    only while its k best held more of what was chosen, lately, than the routers' did. Of many tokens the routers speak.
    """

    def __init__(self, routers: Scorer, experts_per_layer: Sequence[int]) -> None:
        self._routers = routers
        self._sizes = list(experts_per_layer)
        self._maps: dict[tuple[int, int], tuple[Floats, Floats]] = {}  # by (layer, ahead): inverse covariance, weights
        self._right: dict[tuple[int, int], list[float]] = {}  # shares found by the routers and by the map, decayed
        self._asked: dict[tuple[int, int], tuple[Floats, Floats]] = {}  # features [E + 1], what the map makes of them [E]

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
            self._right[key] = [0.0, 0.0]
        corrected = features @ self._maps[key][1]
        self._asked[key] = features, corrected
        plain, mapped = self._right[key]
        return torch.from_numpy(corrected)[None] if mapped > plain else scored

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        chosen, k = list(routed), len(routed)
        for key in [key for key in self._asked if key[0] == layer]:
            features, corrected = self._asked.pop(key)
            if k >= len(corrected):
                continue
            inverse, weights = self._maps[key]
            for index, scores in enumerate((features[:-1], corrected)):
                found = float((scores[chosen] >= np.partition(scores, -k)[-k]).mean())
                self._right[key][index] = MEMORY * self._right[key][index] + (1 - MEMORY) * found
            error = -corrected
            error[chosen] += 1
            projected = inverse @ features
            gain = projected / (1 + float(features @ projected))
            inverse -= np.outer(gain, projected)
            weights += np.outer(gain, error)
