"""Records what routers chose in decode, and what the engine made of it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fate_moe.core import Counters, ExpertId, Lookup
from fate_moe.memory.residency import Residency
from fate_moe.trace.schema import RoutingTrace

__all__ = ["Recorder"]

# Columns, and the counters whose growth they are.
_COUNTED = {"bytes_read": "bytes_read", "overlap": "overlap_seconds", "link": "link_seconds", "predicting": "predicting_seconds"}
_KINDS = {
    "lookups": np.uint8,
    "stall": np.float32,
    "seconds": np.float32,
    "bytes_read": np.int64,
    "overlap": np.float32,
    "link": np.float32,
    "predicting": np.float32,
}
_FOUND = {Lookup.HIT: 0, Lookup.IN_FLIGHT: 1, Lookup.MISS: 2}


class Recorder:
    """Keeps every single-token pass that went through all layers (runtime.recorder); longer passes begin another generation.

    ``router_inputs``: keep what the routers saw too, with the embeddings, the ``routers`` [L, E, D] (linear ones) and the ``norms``
    [L, D] before them. ``prompts``: keep the tokens of longer passes instead, as if they had been decoded one by one; what lookups
    found and how long it took would mean nothing then and is left out. ``residency``: whose counters' growth
    and whose reads are recorded; its journal is the recorder's from then on.
    """

    def __init__(
        self,
        experts_per_layer: Sequence[int],
        *,
        router_inputs: bool = False,
        routers: torch.Tensor | None = None,
        norms: torch.Tensor | None = None,
        prompts: bool = False,
        residency: Residency | None = None,
    ) -> None:
        self._sizes = list(experts_per_layer)
        self._router_inputs = router_inputs
        self._linear = {"routers": routers, "norms": norms}
        self._prompts = prompts
        self._columns: dict[str, list[Any]] = defaultdict(list)
        self._token: dict[str, list[Any]] = defaultdict(list)
        self._embedding: torch.Tensor | None = None  # [1, hidden], of prompts [num_tokens, hidden]; None: this pass is not kept
        self._start: list[int] = []
        self._entered = 0.0
        self._counters = None if prompts or residency is None else residency.counters
        self._journal: list[tuple[ExpertId, bool, float, float]] = []
        if residency is not None and not prompts:
            residency.journal = self._journal
        self._reads: list[tuple[float, ...]] = []
        self._began = 0.0  # when layer 0 was entered
        self._before = Counters()

    @property
    def num_tokens(self) -> int:
        """Recorded so far."""
        return sum(len(column) for column in self._columns["experts"])

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A pass begins on ``embeddings`` [num_tokens, hidden]."""
        self._tick()
        self._finish()
        if self._counters is not None:
            self._before = replace(self._counters)
        if embeddings.shape[0] > 1 or not self._start:
            self._start.append(self.num_tokens)
        self._embedding = embeddings if (embeddings.shape[0] > 1) == self._prompts else None

    def entered(self, layer: int, router_input: torch.Tensor) -> None:
        """``layer`` is about to run on ``router_input`` [num_tokens, hidden]."""
        self._tick()
        self._entered = time.perf_counter()
        if layer == 0:
            self._began = self._entered
        if self._router_inputs and self._embedding is not None:
            self._token["router_inputs"].append(_halves(router_input))

    def computed(
        self,
        layer: int,
        index: torch.Tensor,
        weights: torch.Tensor,
        lookups: dict[ExpertId, Lookup],
        stall_seconds: float,
        predicted: list[tuple[int, float]],
    ) -> None:
        """``layer`` ran for ``index`` [num_tokens, k] with routing ``weights``; its lookups found and it waited so much."""
        if self._embedding is None or len(index) != len(self._embedding) or layer != len(self._token["experts"]):
            self._embedding = None
            return
        weight = weights.reshape(index.shape).float().numpy(force=True)
        order = np.argsort(-weight, axis=1, kind="stable")
        chosen = np.take_along_axis(index.numpy(force=True), order, 1)
        token = self._token
        token["experts"].append(chosen)
        token["probs"].append(np.take_along_axis(weight, order, 1))
        if self._prompts:
            return
        token["lookups"].append([_FOUND[lookups[ExpertId(layer, expert)]] for expert in chosen[0].tolist()])
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
        arrays = {name: np.concatenate(values) for name, values in self._columns.items()}
        if self._counters is not None:
            arrays["reads"] = np.array(self._reads, np.float64).reshape(-1, 6)
        dtype = np.uint8 if max(self._sizes) <= 256 else np.uint16
        experts, probs = arrays.pop("experts").astype(dtype), arrays.pop("probs").astype(np.float16)
        start = np.array([*dict.fromkeys(at for at in self._start if at < len(experts)), len(experts)], np.int64)
        if self._router_inputs:
            arrays |= {name: known.float().numpy(force=True) for name, known in self._linear.items() if known is not None}
        json.dumps(meta)
        return RoutingTrace(experts, probs, start, np.array(self._sizes, np.int64), arrays, meta)

    def _tick(self) -> None:
        if self._entered and not self._prompts:
            self._token["seconds"].append(time.perf_counter() - self._entered)
            if self._counters is not None:
                now, before = replace(self._counters), self._before
                for column, name in _COUNTED.items():
                    self._token[column].append(getattr(now, name) - getattr(before, name))
                self._before = now
        self._entered = 0.0

    def _finish(self) -> None:
        """The pass is over: [num_tokens, L, ...] of each column, if it went through all layers."""
        token, self._token = self._token, defaultdict(list)
        journal, self._journal[:] = self._journal[:], []
        if self._embedding is None or any(len(values) != len(self._sizes) for values in token.values()) or not token["experts"]:
            return
        num_tokens, number = len(self._embedding), self.num_tokens
        self._reads += [
            (number, *expert, demand, began - self._began, ended - self._began) for expert, demand, began, ended in journal
        ]
        for name, values in token.items():
            column = np.stack(values).astype(_KINDS.get(name, values[0].dtype if isinstance(values[0], np.ndarray) else None))
            by_token = column.swapaxes(0, 1) if name in ("experts", "probs", "router_inputs") else column[None]
            assert len(by_token) == num_tokens
            self._columns[name].append(by_token)
        if self._router_inputs:
            self._columns["embeddings"].append(_halves(self._embedding))


def _halves(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(tensor.to(torch.float16).numpy(force=True))
