"""Learns online how to weight several sources that score the same layer. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blend"]

Floats = NDArray[np.float32]

LEARN_EVERY = 16  # tokens between two that a layer learns from, because a step takes time; layers take turns
PRIOR = 20.0  # initial curvature of the Newton steps, per source; an expert of one token adds at most a quarter
SLOPE = 3.0  # initial change of the log odds per unit of the first source


class Blend:
    """``size`` independent sets of weights for ``len(start)`` sources; the first source's weight is 1.

    Logistic regression from the sources' scores of all experts to the chosen experts: one Newton step per token that is learned
    from, starting at the weights ``start``. (Least squares depend too little on the few experts at the border between chosen and
    not, and gave recent use no weight.) A source that adds no information to the others gets weight 0, however good it is alone;
    weights are never negative. In double, as its twin csrc/chances.cpp, so that the order of sums does not show in the weights.
    """

    def __init__(self, size: int, start: Sequence[float]) -> None:
        weights = np.array(start)
        self.weights: Floats = np.tile((weights / weights[0]).astype(np.float32), (size, 1))
        self._slopes: NDArray[np.float64] = np.tile(np.append(SLOPE * weights, 0), (size, 1))  # the last one: intercept
        self._squares: NDArray[np.float64] = np.tile(PRIOR * np.eye(len(weights) + 1), (size, 1, 1))
        self._turn = np.arange(size) % LEARN_EVERY

    def is_due(self, which: int) -> bool:
        """Whether set ``which`` should ``learn`` from this token; call it once a token."""
        self._turn[which] = (self._turn[which] + 1) % LEARN_EVERY
        return bool(self._turn[which] == 0)

    def learn(self, which: int, scores: Sequence[Floats], used: Sequence[int]) -> None:
        """Update set ``which``: ``scores`` are [E] by source, and the experts in ``used`` were chosen."""
        rows = np.stack([*scores, np.ones_like(scores[0])]).astype(np.float64)  # [S + 1, E]
        slopes = self._slopes[which]
        probabilities = 1 / (1 + np.exp(-np.clip(slopes @ rows, -30, 30)))
        self._squares[which] += (rows * (probabilities * (1 - probabilities))) @ rows.T
        probabilities[list(used)] -= 1
        slopes -= np.linalg.solve(self._squares[which], rows @ probabilities)
        self.weights[which, 1:] = np.maximum(slopes[1:-1] / max(float(slopes[0]), 0.1), 0)
