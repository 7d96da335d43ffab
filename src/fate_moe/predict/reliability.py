"""Learns online the probability that an expert with a given score is chosen. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ScoreProbabilities", "isotonic"]

Floats = NDArray[np.float32]

NUM_BINS = 32
LOW, HIGH = -4.0, 4.0
LEARN_EVERY = 32  # observations between two fits, because a fit takes time
PRIOR_STRENGTH = 2.0  # observations per bin


def isotonic(hits: Floats, counts: Floats) -> Floats:
    """The non-decreasing rates nearest to ``hits / counts`` in weighted least squares (pool adjacent violators).

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


class ScoreProbabilities:
    """``size`` tables of the probability that an expert is chosen, by bins of its score; non-decreasing in the score.

    Scores may be in any unit in which 0 is the border between chosen and not, and +-1 is a typical distance from it. ``rates``
    [size, NUM_BINS] are the probabilities.
    """

    def __init__(self, size: int, num_experts: int) -> None:
        centres = LOW + (HIGH - LOW) * (np.arange(NUM_BINS, dtype=np.float32) + 0.5) / NUM_BINS
        prior = np.asarray(1 / (1 + np.exp(-3 * centres)), np.float32)
        self.rates: Floats = np.tile(prior, (size, 1))
        self._hits: Floats = np.tile(np.float32(PRIOR_STRENGTH) * prior, (size, 1))
        self._counts: Floats = np.full((size, NUM_BINS), PRIOR_STRENGTH, np.float32)
        self._seen: NDArray[np.int8] = np.empty((size, LEARN_EVERY, num_experts), np.int8)  # bins
        self._used: list[list[NDArray[np.int8]]] = [[] for _ in range(size)]  # bins of the chosen experts

    @staticmethod
    def bins(scores: Floats) -> NDArray[np.int8]:
        """The bin of each score."""
        scaled = (scores - LOW) * (NUM_BINS / (HIGH - LOW))
        return np.asarray(np.minimum(np.maximum(scaled, 0), NUM_BINS - 1), np.int8)

    def learn(self, which: int, bins: NDArray[np.int8], used: list[int]) -> None:
        """Observe that the experts' scores were in ``bins`` and ``used`` were chosen; updates ``rates`` every LEARN_EVERY calls."""
        seen, hits = self._seen[which], self._used[which]
        seen[len(hits), : len(bins)] = bins
        hits.append(bins[used])
        if len(hits) == LEARN_EVERY:
            self._counts[which] += np.bincount(seen[:, : len(bins)].reshape(-1), minlength=NUM_BINS)
            self._hits[which] += np.bincount(np.concatenate(hits), minlength=NUM_BINS)
            self.rates[which] = isotonic(self._hits[which], self._counts[which])
            hits.clear()
