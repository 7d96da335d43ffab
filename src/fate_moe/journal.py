"""A journal of forward passes: what each MoE layer saw, chose, found and waited for.

The runtime writes it while a pass runs; an observer reads it between passes. So a model computes the same, and by the same path,
with an observer as without one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch

from fate_moe.core import Counters, ExpertId, Lookup

__all__ = ["ForwardPass", "Journal", "LayerPass", "Moment", "Observer", "Read", "Reads"]

Read = tuple[ExpertId, bool, float, float]  # the expert, whether it was a demand read, when it began and ended (time.perf_counter)


class Moment(NamedTuple):
    """``seconds`` (time.perf_counter) and a copy of the residency's counters at that time."""

    seconds: float
    counters: Counters


@dataclass
class LayerPass:
    """One MoE layer in one forward pass. Tensors are copies, in the dtypes that the model has."""

    layer: int
    start: Moment  # as the layer was entered
    router_input: torch.Tensor | None  # [num_tokens, hidden]; None unless the observer keeps inputs
    experts: torch.Tensor  # [num_tokens, top_k] int64, in the router's own order
    weights: torch.Tensor  # [num_tokens, top_k], the routing weights
    lookups: Mapping[ExpertId, Lookup]  # one for each distinct expert
    predicted: Sequence[tuple[int, float]]  # what was predicted for this layer: experts with probabilities
    stall_seconds: float = 0.0


@dataclass
class ForwardPass:
    """One forward pass of the model; ``layers`` in the order in which they ran. A pass that failed lacks some of them."""

    num_tokens: int
    start: Moment  # as the embeddings were known
    embeddings: torch.Tensor | None  # [num_tokens, hidden], a copy; None unless the observer keeps inputs
    layers: list[LayerPass] = field(default_factory=list)
    end: Moment | None = None  # as the next pass began or observing ended
    reads: list[Read] = field(default_factory=list)  # those that ended between ``start`` and ``end``

    def is_whole(self, num_layers: int) -> bool:
        """Whether each of ``num_layers`` MoE layers ran once, in order, for all tokens."""
        return [step.layer for step in self.layers] == list(range(num_layers)) and all(
            len(step.experts) == self.num_tokens for step in self.layers
        )


class Observer(Protocol):
    """Sees forward passes after they ran. Called from the inference thread, between passes, never inside a layer.

    Ten lines that count how often each expert was chosen::

        class Popularity:
            def __init__(self) -> None:
                self.counts = Counter()

            def keeps_inputs(self, num_tokens: int) -> bool:
                return False

            def record(self, forward: ForwardPass) -> None:
                for step in forward.layers:
                    self.counts.update((step.layer, expert) for expert in step.experts.flatten().tolist())
    """

    def keeps_inputs(self, num_tokens: int) -> bool:
        """Whether a pass of ``num_tokens`` that begins now is to be recorded with its embeddings and router inputs.

        They take (1 + num_layers) * num_tokens * hidden numbers until ``record`` returns.
        """

    def record(self, forward: ForwardPass) -> None:
        """The pass ``forward`` is over. What this raises ends the call of the model that comes next, or the observation."""


class Reads(Protocol):
    """What a journal wants of the residency: its counters, and a list that gets every read that ends (None: no list)."""

    counters: Counters
    journal: list[Read] | None


class Journal:
    """Written by the runtime while somebody observes; hands each pass to ``observer`` when the next begins and when it is closed.

    A pass that was under way when observing began is not recorded.
    """

    def __init__(self, observer: Observer, residency: Reads) -> None:
        self._observer = observer
        self._residency = residency
        self._residency.journal = []
        self._pass: ForwardPass | None = None
        self._keeps_inputs = False
        self._entered: tuple[int, Moment, torch.Tensor | None] | None = None
        self._routed: LayerPass | None = None

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A pass begins on ``embeddings`` [num_tokens, hidden]: the one before is over."""
        self._hand_over()
        num_tokens = embeddings.shape[0]
        self._keeps_inputs = self._observer.keeps_inputs(num_tokens)
        self._pass = ForwardPass(num_tokens, self._now(), _copy(embeddings) if self._keeps_inputs else None)

    def entered(self, layer: int, router_input: torch.Tensor) -> None:
        """``layer`` is about to run on ``router_input`` [num_tokens, hidden]."""
        self._routed = None
        if self._pass is not None:
            self._entered = (layer, self._now(), _copy(router_input) if self._keeps_inputs else None)

    def routed(
        self,
        layer: int,
        experts: torch.Tensor,
        weights: torch.Tensor,
        lookups: Mapping[ExpertId, Lookup],
        predicted: Sequence[tuple[int, float]],
    ) -> None:
        """``layer`` chose ``experts`` [num_tokens, top_k] with ``weights`` (as many numbers), and asked for them."""
        if self._entered is not None and self._entered[0] == layer:
            index = _copy(experts)
            self._routed = LayerPass(*self._entered, index, _copy(weights).reshape(index.shape), lookups, predicted)
        self._entered = None

    def computed(self) -> None:
        """The layer that was routed last has run."""
        step, self._routed = self._routed, None
        if self._pass is not None and step is not None:
            step.stall_seconds = self._residency.counters.stall_seconds - step.start.counters.stall_seconds
            self._pass.layers.append(step)

    def close(self) -> None:
        """Hand over the last pass and stop listening to reads."""
        try:
            self._hand_over()
        finally:
            self._residency.journal = None

    def _now(self) -> Moment:
        return Moment(time.perf_counter(), replace(self._residency.counters))

    def _hand_over(self) -> None:
        forward, self._pass = self._pass, None
        self._entered = self._routed = None
        reads, self._residency.journal = self._residency.journal or [], []
        if forward is not None:
            forward.end, forward.reads = self._now(), reads
            self._observer.record(forward)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Buffers are reused from layer to layer."""
    return tensor.detach().clone()
