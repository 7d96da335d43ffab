"""The whole token predicted at once, as soon as it is known: from its embedding and what each layer saw of the token before."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fate_moe.predict.gates import Scorer, affine

__all__ = ["Forecast", "forecast_source"]


def forecast_source(layer: int, num_layers: int) -> int:
    """The layer whose gate input of the token before predicts ``layer``: itself, but the last, which nobody predicts from."""
    return min(layer, max(num_layers - 2, 0))


class Forecast(Scorer):
    """Affine maps [E, 2 * D + 1] by layer, from (embedding, the previous token's gate input at that layer).

    Long lead time: what is said of a layer is the same however far ahead it is asked. After a pass of many tokens their last one is
    the token before; of many tokens it says nothing.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        sizes = [len(weight) for weight in weights]
        hidden = (weights[0].shape[1] - 1) // 2
        of_token = torch.cat([weight[:, [*range(hidden), -1]] for weight in weights])
        self._of_token = affine(of_token)  # D -> the experts of all layers, with their biases
        nothing = torch.zeros(max(sizes), 1, dtype=weights[0].dtype)
        self._of_layer = [affine(torch.cat([w[:, hidden:-1], nothing[: len(w)]], 1)) for w in weights]  # D -> one layer's experts
        self._sizes = sizes
        self._before = torch.zeros(len(sizes), hidden)  # gate inputs of the token before
        self._now = torch.zeros(len(sizes), hidden)  # of this token, as far as its layers have run
        self._scores: list[torch.Tensor] = []  # [1, E] by layer, without what the token before says of it
        self._known = False

    def scores(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        source = layer - ahead
        if source < 0:
            if ahead == 1:
                self._begin(router_input)
        elif ahead == 1:
            self._now[source] = router_input[-1]
            if layer == len(self._sizes) - 1:
                self._known = True
        if not self._scores or len(router_input) > 1:
            return None
        return self._scores[layer] + self._of_layer[layer](self._before[layer : layer + 1])

    def _begin(self, embedding: torch.Tensor) -> None:
        if self._known:
            self._before.copy_(self._now)
            self._before[-1] = self._before[forecast_source(len(self._sizes) - 1, len(self._sizes))]
        ready = len(embedding) == 1 and self._known
        self._scores = list(torch.split(self._of_token(embedding), self._sizes, 1)) if ready else []
