"""How much several sources that predict the same layer should count beside one another, learned online. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blend"]

Floats = NDArray[np.float32]

STUDY_EVERY = 16  # tokens between two that a layer learns its weights from: one takes 40 us, layers take turns
PRIOR = 20.0  # of the Newton steps, in each source's square: an expert of a studied token counts at most a quarter
SLOPE = 3.0  # of the log odds by the first source's unit, at the start


class Blend:
    """Weights of ``len(start)`` sources, for each of ``size`` places where they are heard: the first counts 1.

    Logistic regression from what the sources said of all experts to which were chosen, by one Newton step a token that is studied,
    from the weights of the ``start``. Least squares ask too little of the few experts at the border and gave recent use no weight
    (embedded model, half resident: 91.4 % ready for 2.31 MB a token; this 90.3 for 1.98, fixed weights 89.3 for 1.88).
    A source that adds nothing to the others, however good it is alone, gets no weight; none counts against what it says.
    """

    def __init__(self, size: int, start: Sequence[float]) -> None:
        weights = np.array(start, np.float32)
        self.weights: Floats = np.tile(weights / weights[0], (size, 1))
        self._slopes: Floats = np.tile(np.append(np.float32(SLOPE) * weights, np.float32(0)), (size, 1))  # the last: of one
        self._squares: Floats = np.tile(np.float32(PRIOR) * np.eye(len(weights) + 1, dtype=np.float32), (size, 1, 1))
        self._turn = np.arange(size) % STUDY_EVERY

    def studies(self, which: int) -> bool:
        """Whether place ``which`` should ``learn`` from this token; called once a token."""
        self._turn[which] = (self._turn[which] + 1) % STUDY_EVERY
        return bool(self._turn[which] == 0)

    def learn(self, which: int, said: Sequence[Floats], used: Sequence[int]) -> None:
        """The sources ``said`` [E] each, and the experts in ``used`` were chosen."""
        rows = np.stack([*said, np.ones_like(said[0])])  # [S + 1, E]
        slopes = self._slopes[which]
        chances = 1 / (1 + np.exp(-np.clip(slopes @ rows, -30, 30)))
        self._squares[which] += (rows * (chances * (1 - chances))) @ rows.T
        chances[list(used)] -= 1
        slopes -= np.linalg.solve(self._squares[which], rows @ chances)
        self.weights[which, 1:] = np.maximum(slopes[1:-1] / max(float(slopes[0]), 0.1), 0)
