"""MoE-Infinity's expert activation paths (arXiv 2401.14361): sequences like this one used these experts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["ActivationPath"]

COLLECTION = 64  # sequences that are remembered; the paper's collection has some hundreds for a cluster's traffic
LONGEST = 512  # tokens after which a sequence counts as another
LEAST = 0.02


class ActivationPath:
    """Counts this sequence's activations in a matrix [L, E], finds the most similar one of a collection, and names its experts.

    Similarity is the cosine of the matrices. A sequence begins with a pass of several tokens; its matrix joins the collection when
    the next one begins, in place of the most similar one if the collection is full. A row of the match, as shares of that layer's
    tokens, gives the probabilities; with an empty collection the running matrix stands in.
    """

    gives_probabilities = False

    def __init__(self, experts_per_layer: Sequence[int]) -> None:
        self._sizes = list(experts_per_layer)
        shape = len(self._sizes), max(self._sizes)
        self._running: NDArray[np.float32] = np.zeros(shape, np.float32)
        self._passes = 0
        self._collection: list[NDArray[np.float32]] = []  # flat, of length 1
        self._match: NDArray[np.float32] = self._running  # what rows are taken from
        self._beginning = False

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        if layer == 0:
            if self._beginning or self._passes >= LONGEST:
                self._keep()
            self._passes += 1
        self._running[layer, list(routed)] += 1
        if layer == len(self._sizes) - 1 and self._collection:
            flat = self._running.reshape(-1)
            nearest = int(np.argmax(np.stack(self._collection) @ flat))
            self._match = self._collection[nearest].reshape(self._running.shape)

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        self._beginning = self._beginning or router_input.shape[0] > 1
        row = self._match[layer, : self._sizes[layer]]
        most = float(row.max())
        if most <= 0:
            return []
        order = np.argsort(-row, kind="stable")
        return [
            (expert, share) for expert, share in zip(order.tolist(), (row[order] / most).tolist(), strict=True) if share > LEAST
        ]

    def _keep(self) -> None:
        """The running matrix joins the collection, and another begins."""
        flat = self._running.reshape(-1)
        length = float(np.linalg.norm(flat))
        if length > 0:
            flat = flat / length
            if len(self._collection) < COLLECTION:
                self._collection.append(flat)
            else:
                self._collection[int(np.argmax(np.stack(self._collection) @ flat))] = flat
        self._running = np.zeros_like(self._running)
        self._match = self._running if not self._collection else self._match
        self._passes = 0
        self._beginning = False
