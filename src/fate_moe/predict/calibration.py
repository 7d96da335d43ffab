"""From scores to probabilities, learned as it goes. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Calibration", "isotonic"]

Floats = NDArray[np.float32]

NUM_BINS = 32
LOW, HIGH = -4.0, 4.0
LEARN_EVERY = 32  # observations of a layer between two fits: one takes 50 us
PRIOR_STRENGTH = 2.0


def isotonic(hits: Floats, counts: Floats) -> Floats:
    """The non-decreasing rates that are nearest to ``hits / counts`` in weighted least squares (pool adjacent violators).

    ``counts`` must be positive.
    """
    pools: list[tuple[float, float, int]] = []  # hits, counts, bins
    for hit, count in zip(hits.tolist(), counts.tolist(), strict=True):
        pool = (hit, count, 1)
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            last = pools.pop()
            pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
        pools.append(pool)
    return np.repeat(np.array([hit / count for hit, count, _ in pools], np.float32), [bins for _, _, bins in pools])


class Calibration:
    """By layer, the share of experts that were used among those with such a score; monotone, so that order is kept.

    Scores are in any unit in which 0 is the border between chosen and not and +-1 is a typical distance from it.
    """

    def __init__(self, num_layers: int) -> None:
        centres = LOW + (HIGH - LOW) * (np.arange(NUM_BINS, dtype=np.float32) + 0.5) / NUM_BINS
        prior = 1 / (1 + np.exp(-3 * centres))
        self.hits: Floats = np.tile((PRIOR_STRENGTH * prior).astype(np.float32), (num_layers, 1))
        self.counts: Floats = np.full((num_layers, NUM_BINS), PRIOR_STRENGTH, np.float32)
        self._rates: Floats = np.stack([isotonic(h, c) for h, c in zip(self.hits, self.counts, strict=True)])
        self._due = [0] * num_layers

    def bins(self, scores: Floats) -> NDArray[np.intp]:
        """The bin of each score."""
        scaled = (scores - LOW) * (NUM_BINS / (HIGH - LOW))
        return np.asarray(np.clip(scaled, 0, NUM_BINS - 1), np.intp)

    def probabilities(self, layer: int, bins: NDArray[np.intp]) -> Floats:
        """Of experts of ``layer`` whose scores fell into ``bins``."""
        return np.asarray(self._rates[layer][bins], np.float32)

    def learn(self, layer: int, bins: NDArray[np.intp], used: list[int]) -> None:
        """All experts of ``layer`` had scores in ``bins``, and those in ``used`` were chosen."""
        self.counts[layer] += np.bincount(bins, minlength=NUM_BINS)
        self.hits[layer] += np.bincount(bins[used], minlength=NUM_BINS)
        self._due[layer] += 1
        if self._due[layer] >= LEARN_EVERY:
            self.refresh(layer)

    def refresh(self, layer: int) -> None:
        """Let ``probabilities`` say what was learned."""
        self._due[layer] = 0
        self._rates[layer] = isotonic(self.hits[layer], self.counts[layer])
