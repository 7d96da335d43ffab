"""Predicts the experts that a similar earlier sequence used (MoE-Infinity, arXiv 2401.14361). No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["ActivationPath"]

MAX_SEQUENCES = 64  # in the collection; the paper's has some hundreds, for the traffic of a cluster
MAX_TOKENS = 512  # a longer sequence is split
MIN_PROBABILITY = 0.02  # less likely experts are not predicted


class ActivationPath:
    """Counts this sequence's activations in a matrix [L, E] and predicts the experts of the most similar matrix of a collection.

    Similarity is the cosine of two matrices. A sequence begins with a pass of several tokens. When the next one begins, its matrix
    is added to the collection; a full collection replaces the most similar matrix. A row of the match, divided by its maximum,
    gives the probabilities. While the collection is empty, the current matrix is used instead.
    """

    gives_probabilities = False

    def __init__(self, experts_per_layer: Sequence[int]) -> None:
        self._sizes = list(experts_per_layer)
        shape = len(self._sizes), max(self._sizes)
        self._current: NDArray[np.float32] = np.zeros(shape, np.float32)
        self._passes = 0
        self._collection: list[NDArray[np.float32]] = []  # flat, of norm 1
        self._match: NDArray[np.float32] = self._current  # predictions are its rows
        self._beginning = False

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        if layer == 0:
            if self._beginning or self._passes >= MAX_TOKENS:
                self._add_to_collection()
            self._passes += 1
        self._current[layer, list(routed)] += 1
        if layer == len(self._sizes) - 1 and self._collection:
            flat = self._current.reshape(-1)
            nearest = int(np.argmax(np.stack(self._collection) @ flat))
            self._match = self._collection[nearest].reshape(self._current.shape)

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        self._beginning = self._beginning or router_input.shape[0] > 1
        row = self._match[layer, : self._sizes[layer]]
        largest = float(row.max())
        if largest <= 0:
            return []
        order = np.argsort(-row, kind="stable")
        return [
            (expert, probability)
            for expert, probability in zip(order.tolist(), (row[order] / largest).tolist(), strict=True)
            if probability > MIN_PROBABILITY
        ]

    def _add_to_collection(self) -> None:
        """Add the current matrix to the collection and start a new one."""
        flat = self._current.reshape(-1)
        length = float(np.linalg.norm(flat))
        if length > 0:
            flat = flat / length
            if len(self._collection) < MAX_SEQUENCES:
                self._collection.append(flat)
            else:
                self._collection[int(np.argmax(np.stack(self._collection) @ flat))] = flat
        self._current = np.zeros_like(self._current)
        self._match = self._current if not self._collection else self._match
        self._passes = 0
        self._beginning = False
