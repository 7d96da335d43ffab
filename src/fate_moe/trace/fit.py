"""Fits gates that know the next layer's choice better than its own router does: ridge regression on the model's own routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fate_moe.core import ExpertId, Lookup
from fate_moe.predict.forecast import forecast_source
from fate_moe.predict.gates import FittedGates, LinearRouters

__all__ = ["GateFitter", "forecast_input", "recall", "recall_of_gates"]

RIDGE = 3e-3  # of the inputs' mean square; between 1e-3 and 1e-2 recall differs by less than 0.1 points


class GateFitter:
    """Watches passes of many tokens (runtime.observer) and sums up what ridge regression needs: nothing is kept per token.

    A gate of look-ahead a: its target is which experts layer l chose, its input the gate input of layer l - a (layer -1's is the
    embedding), for a up to ``look_ahead``. With ``forecast`` also from the embedding and the previous token's gate input at the
    same layer (predict.forecast). Memory, floats a layer: (hidden + 1)^2 + look_ahead * (hidden + 1) * experts, and for the
    forecast (2 * hidden + 1)^2. With ``testing`` set, passes are kept (in halves) instead of learned from.
    """

    def __init__(self, experts_per_layer: Sequence[int], hidden: int, look_ahead: int = 1, *, forecast: bool = False) -> None:
        self.testing = False
        self.passes: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []  # test passes: inputs by source, chosen by layer
        self.look_ahead = min(look_ahead, len(experts_per_layer))
        self._sizes = list(experts_per_layer)
        self._near = [
            _Ridge(hidden, sum(self._sizes[at : at + self.look_ahead])) for at in range(len(self._sizes))
        ]  # by source + 1
        self._whole = [_Ridge(2 * hidden, size) for size in self._sizes] if forecast else []
        self._inputs: list[torch.Tensor] = []  # of this pass: embeddings, then gate inputs
        self._chosen: list[torch.Tensor] = []

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A pass begins."""
        self._inputs, self._chosen = [embeddings], []

    def entered(self, layer: int, gate_input: torch.Tensor) -> None:
        """What predicts layers after ``layer``."""
        if layer == len(self._inputs) - 1:
            self._inputs.append(gate_input)

    def computed(
        self,
        layer: int,
        index: torch.Tensor,
        weights: torch.Tensor,
        lookups: dict[ExpertId, Lookup],
        stall_seconds: float,
        predicted: list[tuple[int, float]],
    ) -> None:
        """``index`` [num_tokens, k] is what it chose."""
        if layer != len(self._chosen) or layer + 2 != len(self._inputs) or len(index) != len(self._inputs[0]):
            return
        self._chosen.append(index)
        if len(self._chosen) < len(self._sizes):
            return
        if self.testing:
            self.passes.append(([x.half() for x in self._inputs], self._chosen))
            return
        targets = [torch.zeros(len(i), size).scatter_(1, i, 1.0) for i, size in zip(self._chosen, self._sizes, strict=True)]
        for at, ridge in enumerate(self._near):
            ridge.add(self._inputs[at].float(), torch.cat(targets[at : at + self.look_ahead], 1))
        for at, ridge in enumerate(self._whole):
            ridge.add(forecast_input(self._inputs, at), targets[at][1:])

    def gates(self) -> list[list[torch.Tensor | None]]:
        """By look-ahead and layer, [num_experts, hidden + 1] or None. Raises ValueError where nothing was seen."""
        found: list[list[torch.Tensor | None]] = [[None] * len(self._sizes) for _ in range(self.look_ahead)]
        for at, ridge in enumerate(self._near):
            sizes = self._sizes[at : at + self.look_ahead]
            for ahead, gate in enumerate(torch.split(ridge.solve(), sizes)):
                found[ahead][at + ahead] = gate.contiguous()
        return found

    def forecast(self) -> list[torch.Tensor]:
        """By layer, [num_experts, 2 * hidden + 1]; empty unless asked for."""
        return [ridge.solve() for ridge in self._whole]


def forecast_input(inputs: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
    """[num_tokens - 1, 2 * hidden] from a pass's ``inputs`` (embeddings, then all gate inputs): what foretells ``layer``."""
    before = inputs[1 + forecast_source(layer, len(inputs) - 1)]
    return torch.cat([inputs[0][1:].float(), before[:-1].float()], 1)


class _Ridge:
    """Sums for an affine map of ``width`` inputs to ``targets`` outputs."""

    def __init__(self, width: int, targets: int) -> None:
        self._squares = torch.zeros(width + 1, width + 1)
        self._products = torch.zeros(width + 1, targets)

    def add(self, x: torch.Tensor, target: torch.Tensor) -> None:
        """``x`` [n, width] fp32, ``target`` [n, targets]."""
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        self._squares.addmm_(x.mT, x)
        self._products.addmm_(x.mT, target)

    def solve(self) -> torch.Tensor:
        """[targets, width + 1]."""
        mean_square = float(self._squares.diagonal().mean())
        if not mean_square:
            raise ValueError("a layer ran for no token")
        damped = self._squares.double() + RIDGE * mean_square * torch.eye(len(self._squares), dtype=torch.float64)
        solved: torch.Tensor = torch.linalg.solve(damped, self._products.double())
        return solved.mT.float().contiguous()


def recall_of_gates(
    fitter: GateFitter, gates: Sequence[Sequence[torch.Tensor | None]], whole: Sequence[torch.Tensor], routers: LinearRouters | None
) -> dict[str, Any]:
    """Recall at top-k, k + 2 and 2k on the passes that were kept for testing; keys are widths, lists go by layer.

    ``by_ahead``: for each look-ahead plain routers (with the norm, where there is one) beside fitted; ``forecast``; and in
    ``fitted_layers`` by look-ahead the layers where fitted is better at k + 2.
    """
    inputs = [torch.cat(x) for x in zip(*(inputs for inputs, _ in fitter.passes), strict=True)]
    chosen = [torch.cat(index) for index in zip(*(chosen for _, chosen in fitter.passes), strict=True)]
    top_k = chosen[0].shape[1]
    widths = (top_k, top_k + 2, 2 * top_k)
    by_ahead, better, fitted = [], [], FittedGates(*gates)
    for ahead, row in enumerate(gates, start=1):
        found: dict[str, dict[int, list[float | None]]] = {name: {width: [] for width in widths} for name in ("plain", "fitted")}
        for layer in range(ahead - 1, len(row)):
            x = inputs[layer - ahead + 1].float()
            plain = None if routers is None else routers.scores(layer, x, ahead)
            for name, scores in (("plain", plain), ("fitted", fitted.scores(layer, x, ahead))):
                for width in widths:
                    found[name][width].append(None if scores is None else recall(scores, chosen[layer], width))
        by_ahead.append({name: {w: {"mean": _mean(v), "layers": v} for w, v in rows.items()} for name, rows in found.items()})
        pairs = zip(found["plain"][top_k + 2], found["fitted"][top_k + 2], strict=True)
        better.append([layer for layer, (plain_, fitted_) in enumerate(pairs, ahead - 1) if (fitted_ or 0) >= (plain_ or 0)])
    foretold = {}
    if whole:
        for width in widths:
            layers = [_recall_of_forecast(fitter, weight, layer, width) for layer, weight in enumerate(whole)]
            foretold[width] = {"mean": _mean(layers), "layers": layers}
    return {"by_ahead": by_ahead, "forecast": foretold, "fitted_layers": better}


def _recall_of_forecast(fitter: GateFitter, weight: torch.Tensor, layer: int, width: int) -> float:
    found = []
    for inputs, chosen in fitter.passes:
        x = torch.nn.functional.pad(forecast_input(inputs, layer), (0, 1), value=1.0)
        found.append(recall(x @ weight.mT, chosen[layer][1:], width))
    return sum(found) / len(found)


def _mean(values: Sequence[float | None]) -> float | None:
    """Of what comes from a gate input: layer 0's, from the embedding, is named on its own."""
    known = [value for value in values[1:] if value is not None]
    return sum(known) / len(known) if known else None


def recall(scores: torch.Tensor, chosen: torch.Tensor, width: int) -> float:
    """The share of ``chosen`` [N, k] among the ``width`` best of ``scores`` [N, E]."""
    guessed = scores.topk(min(width, scores.shape[1]), dim=-1).indices
    return float((chosen[:, :, None] == guessed[:, None, :]).any(-1).float().mean())
