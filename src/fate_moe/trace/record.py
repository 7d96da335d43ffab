"""Records what routers chose in decode, and what the engine made of it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fate_moe.core import Lookup
from fate_moe.journal import ForwardPass
from fate_moe.trace.schema import RoutingTrace

__all__ = ["Recorder"]

# Columns, the counters whose growth they are, and their dtypes.
_COUNTED = {
    "stall": ("stall_seconds", np.float32),
    "bytes_read": ("bytes_read", np.int64),
    "overlap": ("overlap_seconds", np.float32),
    "link": ("link_seconds", np.float32),
    "predicting": ("predicting_seconds", np.float32),
}
_FOUND = {Lookup.HIT: 0, Lookup.IN_FLIGHT: 1, Lookup.MISS: 2}


class Recorder:
    """An observer that records every single-token pass that went through all layers; longer passes begin another generation.

    ``router_inputs``: record router inputs and embeddings too, with the ``routers`` [L, E, D] (linear ones) and the ``norms``
    [L, D] before them. ``prompts``: record the tokens of longer passes instead, as if they had been decoded one by one; lookups and
    times, which would mean nothing then, are omitted.
    """

    def __init__(
        self,
        experts_per_layer: Sequence[int],
        *,
        router_inputs: bool = False,
        routers: torch.Tensor | None = None,
        norms: torch.Tensor | None = None,
        prompts: bool = False,
    ) -> None:
        self._sizes = list(experts_per_layer)
        self._router_inputs = router_inputs
        self._linear = {"routers": routers, "norms": norms}
        self._prompts = prompts
        self._columns: dict[str, list[Any]] = defaultdict(list)  # by name: [num_tokens, L, ...] of each pass
        self._start: list[int] = []
        self._reads: list[tuple[float, ...]] = []

    @property
    def num_tokens(self) -> int:
        """Recorded so far; the pass that ran last is recorded when the next begins or observing ends."""
        return sum(len(column) for column in self._columns["experts"])

    def keeps_inputs(self, num_tokens: int) -> bool:
        """Whether ``record`` uses the inputs of such a pass."""
        return self._router_inputs and (num_tokens > 1) == self._prompts

    def record(self, forward: ForwardPass) -> None:
        """Record ``forward`` if it is of the kind that is recorded and went through all layers."""
        if forward.num_tokens > 1 or not self._start:
            self._start.append(self.num_tokens)
        if (forward.num_tokens > 1) != self._prompts or not forward.is_whole(len(self._sizes)):
            return
        found = self._routing(forward)
        if not self._prompts:
            if any(len(step.lookups) != step.experts.shape[1] for step in forward.layers):
                return  # a family that masks choices: the format has no place for fewer than k experts
            self._reads += _timeline(self.num_tokens, forward)
            found |= self._times(forward)
        for name, column in found.items():
            self._columns[name].append(column)

    def trace(self, **meta: Any) -> RoutingTrace:
        """What was recorded, with ``meta`` (it must be JSON). Raises ValueError if nothing was."""
        if not self.num_tokens:
            raise ValueError("nothing was recorded: no token was decoded one by one")
        arrays = {name: np.concatenate(values) for name, values in self._columns.items()}
        if not self._prompts:
            arrays["reads"] = np.array(self._reads, np.float64).reshape(-1, 6)
        dtype = np.uint8 if max(self._sizes) <= 256 else np.uint16
        experts, probs = arrays.pop("experts").astype(dtype), arrays.pop("probs").astype(np.float16)
        start = np.array([*dict.fromkeys(at for at in self._start if at < len(experts)), len(experts)], np.int64)
        if self._router_inputs:
            arrays |= {name: known.float().numpy(force=True) for name, known in self._linear.items() if known is not None}
        json.dumps(meta)
        return RoutingTrace(experts, probs, start, np.array(self._sizes, np.int64), arrays, meta)

    def _routing(self, forward: ForwardPass) -> dict[str, NDArray[Any]]:
        """What was chosen, likeliest first, and what the routers saw: [num_tokens, L, ...]."""
        weights = np.stack([step.weights.float().numpy(force=True) for step in forward.layers], 1)
        experts = np.stack([step.experts.numpy(force=True) for step in forward.layers], 1)
        order = np.argsort(-weights, axis=2, kind="stable")
        columns: dict[str, NDArray[Any]] = {
            "experts": np.take_along_axis(experts, order, 2),
            "probs": np.take_along_axis(weights, order, 2),
        }
        inputs = [step.router_input for step in forward.layers if step.router_input is not None]
        if self._router_inputs and forward.embeddings is not None and inputs:
            columns["router_inputs"] = np.stack([_halves(router_input) for router_input in inputs], 1)
            columns["embeddings"] = _halves(forward.embeddings)
        return columns

    def _times(self, forward: ForwardPass) -> dict[str, NDArray[Any]]:
        """What the one token's lookups found, what was predicted, and how long all took: [1, L, ...].

        A layer's times end when the next one is entered, the last one's when the pass is over; what was counted between the
        embedding and layer 0 belongs to layer 0.
        """
        steps, end = forward.layers, forward.end or forward.layers[-1].start
        bounds = [step.start.seconds for step in steps] + [end.seconds]
        counted = [forward.start.counters, *(step.start.counters for step in steps[1:]), end.counters]
        columns: dict[str, NDArray[Any]] = {"seconds": np.diff(bounds).astype(np.float32)}
        for name, (counter, dtype) in _COUNTED.items():
            columns[name] = np.diff([getattr(counters, counter) for counters in counted]).astype(dtype)
        predicted = np.zeros((len(steps), max(self._sizes)), np.float16)
        lookups = []
        for step, row in zip(steps, predicted, strict=True):
            found = {expert.expert: _FOUND[lookup] for expert, lookup in step.lookups.items()}
            order = step.weights[0].argsort(descending=True, stable=True)
            lookups.append([found[expert] for expert in step.experts[0, order].tolist()])
            for expert, probability in step.predicted:
                row[expert] = probability
        columns["lookups"], columns["predicted"] = np.array(lookups, np.uint8), predicted
        return {name: column[None] for name, column in columns.items()}


def _timeline(token: int, forward: ForwardPass) -> list[tuple[float, ...]]:
    """The rows of ``reads`` (trace.schema) for one pass."""
    began = forward.layers[0].start.seconds
    return [(token, *expert, demand, start - began, end - began) for expert, demand, start, end in forward.reads]


def _halves(tensor: torch.Tensor) -> NDArray[Any]:
    return np.asarray(tensor.to(torch.float16).numpy(force=True))
