"""The whole token foretold at once, as soon as it is known: from its embedding and what each layer saw of the token before."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fate_moe.predict.gates import Scorer

__all__ = ["Forecast", "forecast_source"]


def forecast_source(layer: int, num_layers: int) -> int:
    """The layer whose gate input of the token before foretells ``layer``: itself, but the last, which nobody predicts from."""
    return min(layer, max(num_layers - 2, 0))


class Forecast(Scorer):
    """Affine maps [E, 2 * D + 1] by layer, from (embedding, the previous token's gate input at that layer): one product a token.

    Long lead time: what is said of a layer is the same however far ahead it is asked. After a pass of many tokens their last one is
    the token before; of many tokens it says nothing.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        sizes = [len(weight) for weight in weights]
        hidden = (weights[0].shape[1] - 1) // 2
        padded = torch.stack([torch.nn.functional.pad(weight.float(), (0, 0, 0, max(sizes) - len(weight))) for weight in weights])
        self._of_token = padded[:, :, :hidden].reshape(-1, hidden).contiguous()  # [L * E, D]
        self._of_layer = padded[:, :, hidden : 2 * hidden].contiguous()  # [L, E, D]
        self._bias = padded[:, :, -1].contiguous()  # [L, E]
        self._sizes = sizes
        self._before = torch.zeros(len(sizes), hidden)  # gate inputs of the token before
        self._now = torch.zeros(len(sizes), hidden)  # of this token, as far as its layers have run
        self._scores: torch.Tensor | None = None  # [L, E]
        self._known = False

    def scores(self, layer: int, gate_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        source = layer - ahead
        if source < 0:
            if ahead == 1:
                self._begin(gate_input)
        elif ahead == 1:
            self._now[source] = gate_input[-1]
            if layer == len(self._sizes) - 1:
                self._known = True
        return None if self._scores is None or len(gate_input) > 1 else self._scores[None, layer, : self._sizes[layer]]

    def _begin(self, embedding: torch.Tensor) -> None:
        if self._known:
            self._before.copy_(self._now)
            self._before[-1] = self._before[forecast_source(len(self._sizes) - 1, len(self._sizes))]
        if len(embedding) > 1 or not self._known:
            self._scores = None
            return
        of_token = (self._of_token @ embedding[0].float()).view(self._bias.shape)
        self._scores = self._bias + of_token + torch.bmm(self._of_layer, self._before[:, :, None])[:, :, 0]
