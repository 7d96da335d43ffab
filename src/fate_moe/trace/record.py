"""Records what routers chose in decode, and what the engine made of it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fate_moe.core import ExpertId, Lookup
from fate_moe.trace.schema import RoutingTrace

__all__ = ["Recorder"]

_FOUND = {Lookup.HIT: 0, Lookup.IN_FLIGHT: 1, Lookup.MISS: 2}


class Recorder:
    """Keeps every single-token pass that went through all layers (runtime.recorder); longer passes begin another generation.

    ``gate_inputs``: keep what the routers saw too, with the embeddings and the ``routers`` [L, E, D] (linear ones).
    """

    def __init__(self, experts_per_layer: Sequence[int], *, gate_inputs: bool = False, routers: torch.Tensor | None = None) -> None:
        self._sizes = list(experts_per_layer)
        self._gate_inputs = gate_inputs
        self._routers = routers
        self._columns: dict[str, list[Any]] = defaultdict(list)
        self._token: dict[str, list[Any]] = defaultdict(list)
        self._embedding: torch.Tensor | None = None
        self._start: list[int] = []
        self._entered = 0.0

    @property
    def num_tokens(self) -> int:
        """Recorded so far."""
        return len(self._columns["experts"])

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A pass begins on ``embeddings`` [num_tokens, hidden]."""
        self._tick()
        self._finish()
        if embeddings.shape[0] > 1 or not self._start:
            self._start.append(self.num_tokens)
        self._embedding = embeddings[0] if embeddings.shape[0] == 1 else None

    def entered(self, layer: int, gate_input: torch.Tensor) -> None:
        """``layer`` is about to run on ``gate_input`` [num_tokens, hidden]."""
        self._tick()
        self._entered = time.perf_counter()
        if self._gate_inputs and self._embedding is not None:
            self._token["gate_inputs"].append(gate_input[0].to(torch.float16).numpy(force=True))

    def computed(
        self,
        layer: int,
        index: torch.Tensor,
        weights: torch.Tensor,
        lookups: dict[ExpertId, Lookup],
        stall_seconds: float,
        predicted: list[tuple[int, float]],
    ) -> None:
        """``layer`` ran for ``index`` [1, k] with routing ``weights`` [1, k]; its lookups found and it waited so much."""
        if self._embedding is None or index.shape[0] != 1 or layer != len(self._token["experts"]):
            self._embedding = None
            return
        weight = weights.reshape(-1).float().numpy(force=True)
        order = np.argsort(-weight, kind="stable")
        chosen = index.reshape(-1).numpy(force=True)[order]
        token = self._token
        token["experts"].append(chosen)
        token["probs"].append(weight[order])
        token["lookups"].append([_FOUND[lookups[ExpertId(layer, expert)]] for expert in chosen.tolist()])
        token["stall"].append(stall_seconds)
        chances = np.zeros(max(self._sizes), np.float16)
        for expert, probability in predicted:
            chances[expert] = probability
        token["predicted"].append(chances)

    def trace(self, **meta: Any) -> RoutingTrace:
        """What was recorded. Raises ValueError if nothing was."""
        self._tick()
        self._finish()
        if not self.num_tokens:
            raise ValueError("nothing was recorded: no token was decoded one by one")
        arrays = {name: np.stack(values) for name, values in self._columns.items()}
        dtype = np.uint8 if max(self._sizes) <= 256 else np.uint16
        experts, probs = arrays.pop("experts").astype(dtype), arrays.pop("probs").astype(np.float16)
        start = np.array([*dict.fromkeys(at for at in self._start if at < len(experts)), len(experts)], np.int64)
        if self._gate_inputs and self._routers is not None:
            arrays["routers"] = self._routers.float().numpy(force=True)
        json.dumps(meta)
        return RoutingTrace(experts, probs, start, np.array(self._sizes, np.int64), arrays, meta)

    def _tick(self) -> None:
        if self._entered:
            self._token["seconds"].append(time.perf_counter() - self._entered)
            self._entered = 0.0

    def _finish(self) -> None:
        token, self._token = self._token, defaultdict(list)
        if len(token["experts"]) != len(self._sizes) or self._embedding is None:
            return
        kinds = {"lookups": np.uint8, "stall": np.float32, "seconds": np.float32}
        for name, values in token.items():
            if len(values) != len(self._sizes):
                return
            self._columns[name].append(np.array(values, kinds.get(name)))
        if self._gate_inputs:
            self._columns["embeddings"].append(self._embedding.to(torch.float16).numpy(force=True))
