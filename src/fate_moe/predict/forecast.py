"""Predicts all layers of a token at once, from its embedding and the router inputs of the previous token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fate_moe.predict.gates import Affine, Scorer

__all__ = ["Forecast", "forecast_source"]


def forecast_source(layer: int, num_layers: int) -> int:
    """The layer whose router input at the previous token predicts ``layer``: itself, or the last but one for the last layer."""
    return min(layer, max(num_layers - 2, 0))


class Forecast(Scorer):
    """Affine maps [E, 2 * D + 1] by layer, from (embedding, the previous token's router input at that layer).

    The scores of a layer are the same at any look-ahead. After a pass of many tokens, the last one is the previous token. There are
    no scores for a pass of many tokens.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        sizes = [len(weight) for weight in weights]
        hidden = (weights[0].shape[1] - 1) // 2
        token_weights = torch.cat([weight[:, [*range(hidden), -1]] for weight in weights])
        self._token_map = Affine(token_weights)  # D -> the experts of all layers, with their biases
        nothing = torch.zeros(max(sizes), 1, dtype=weights[0].dtype)
        self._layer_maps = [Affine(torch.cat([w[:, hidden:-1], nothing[: len(w)]], 1)) for w in weights]  # D -> one layer's experts
        self._sizes = sizes
        # Router inputs: those of the previous token, and those of this one, of the layers that have run.
        self._previous, self._current = (torch.zeros(len(sizes), hidden, dtype=torch.float32) for _ in range(2))
        self._scores: list[torch.Tensor] = []  # [1, E] by layer, the embedding's part
        self._has_previous = False

    def scores(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        source = layer - ahead
        if source < 0:
            if ahead == 1:
                self._begin(router_input)
        elif ahead == 1:
            self._current[source] = router_input[-1]
            if layer == len(self._sizes) - 1:
                self._has_previous = True
        if not self._scores or len(router_input) > 1:
            return None
        return self._scores[layer] + self._layer_maps[layer](self._previous[layer : layer + 1])

    def _begin(self, embedding: torch.Tensor) -> None:
        if self._has_previous:
            self._previous.copy_(self._current)
            self._previous[-1] = self._previous[forecast_source(len(self._sizes) - 1, len(self._sizes))]
        ready = len(embedding) == 1 and self._has_previous
        self._scores = list(torch.split(self._token_map(embedding), self._sizes, 1)) if ready else []
