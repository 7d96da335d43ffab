"""Recall: the fraction of chosen experts that fitted gates and plain routers predict, by layer and number of experts named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from fate_moe.predict.forecast import forecast_source
from fate_moe.predict.gates import LinearRouters
from fate_moe.trace.fit import Passes

__all__ = ["RecallMeter"]

Gates = Sequence[Sequence[torch.Tensor | None]]
Kind = tuple[str, int]  # "plain" or "fitted" and the look-ahead; "forecast" and 0


class RecallMeter(Passes):
    """Compares what ``gates`` (by look-ahead and layer, [num_experts, hidden + 1]), ``routers`` and ``forecast`` predict for passes
    of many tokens with what was chosen, at top-k, k + 2, 2k and 3k."""

    def __init__(
        self, gates: Gates, routers: LinearRouters | None, forecast: Sequence[torch.Tensor] = (), num_layers: int | None = None
    ) -> None:
        super().__init__(num_layers or len(gates[0]))
        self.num_tokens = 0
        self._gates = gates
        self._routers = routers
        self._forecast = forecast
        self._top_k = 0
        self._found: dict[tuple[Kind, int, int], float] = defaultdict(float)  # by kind, width and layer: summed over tokens
        self._asked: dict[tuple[Kind, int], int] = defaultdict(int)  # tokens

    def whole_pass(self, inputs: list[torch.Tensor], chosen: list[torch.Tensor]) -> None:
        self._top_k = chosen[0].shape[1]
        self.num_tokens += len(inputs[0])
        for ahead, row in enumerate(self._gates, start=1):
            for layer in range(ahead - 1, len(row)):
                x = inputs[layer - ahead + 1].float()
                if self._routers is not None and (scores := self._routers.scores(layer, x, ahead)) is not None:
                    self._count(("plain", ahead), layer, scores, chosen[layer])
                if (gate := row[layer]) is not None:
                    self._count(("fitted", ahead), layer, x @ gate[:, :-1].mT + gate[:, -1], chosen[layer])
        for layer, gate in enumerate(self._forecast):
            before = inputs[1 + forecast_source(layer, self._num_layers)]
            x = torch.cat([inputs[0][1:].float(), before[:-1].float()], 1)
            self._count(("forecast", 0), layer, x @ gate[:, :-1].mT + gate[:, -1], chosen[layer][1:])

    def _count(self, kind: Kind, layer: int, scores: torch.Tensor, chosen: torch.Tensor) -> None:
        self._asked[kind, layer] += len(chosen)
        order = scores.topk(min(3 * self._top_k, scores.shape[1]), dim=-1).indices
        for width in self.widths:
            hits = (chosen[:, :, None] == order[:, None, :width]).any(-1)
            self._found[kind, width, layer] += float(hits.float().mean(1).sum())

    @property
    def widths(self) -> tuple[int, ...]:
        """How many experts are named, ascending."""
        k = self._top_k
        return tuple(sorted({k, k + 2, 2 * k, 3 * k}))

    def better(self, ahead: int) -> list[int]:
        """The layers whose fitted gate predicts as well as the router or better, at k + 2."""
        width = self._top_k + 2
        plain, fitted = (self._layers((name, ahead), width) for name in ("plain", "fitted"))
        return [layer for layer, (p, f) in enumerate(zip(plain, fitted, strict=True)) if f is not None and f >= (p or 0)]

    def table(self) -> dict[str, Any]:
        """``by_ahead``: for each look-ahead, plain and fitted; ``forecast``. Keys are widths, lists go by layer (None: not
        predicted); means are over the layers that are predicted from a router input, so from the look-ahead on."""
        by_ahead = [
            {name: self._rows((name, ahead), ahead) for name in ("plain", "fitted")} for ahead in range(1, len(self._gates) + 1)
        ]
        return {"by_ahead": by_ahead, "forecast": self._rows(("forecast", 0), 0) if self._forecast else {}}

    def _rows(self, kind: Kind, first: int) -> dict[int, dict[str, Any]]:
        rows = {}
        for width in self.widths:
            layers = self._layers(kind, width)
            known = [recall for recall in layers[first:] if recall is not None]
            rows[width] = {"mean": sum(known) / len(known) if known else None, "layers": layers}
        return rows

    def _layers(self, kind: Kind, width: int) -> list[float | None]:
        return [
            self._found[kind, width, layer] / self._asked[kind, layer] if self._asked[kind, layer] else None
            for layer in range(self._num_layers)
        ]
