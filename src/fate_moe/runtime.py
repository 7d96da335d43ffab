"""One token's way through one MoE block: route -> acquire -> (prefetch the next) -> compute -> release."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fate_moe.core import ExpertId, Lookup, Predictor, Router, Routing
from fate_moe.kernels.cpu import SlotExperts
from fate_moe.memory.residency import Lease, Residency
from fate_moe.memory.view_selector import ViewSelector
from fate_moe.predict.prefetcher import Prefetcher

__all__ = ["ExpertRuntime", "Observer", "rows_by_expert"]


def rows_by_expert(index: torch.Tensor, num_experts: int) -> dict[int, list[int]]:
    """The rows of ``index.reshape(-1)`` that chose each expert, most chosen expert first, ties in routing order.

    ``index`` [num_tokens, top_k] int64. Entries outside 0..num_experts-1 (families mask choices so) belong to no expert.
    """
    rows: dict[int, list[int]] = {}
    for row, expert in enumerate(index.reshape(-1).tolist()):
        if 0 <= expert < num_experts:
            rows.setdefault(expert, []).append(row)
    return rows if len(rows) == index.numel() else dict(sorted(rows.items(), key=lambda item: -len(item[1])))


class Observer(Protocol):
    """Is told of every pass, before anything else happens to it; see trace.record.Recorder. Must not change what it is given."""

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A forward pass begins on ``embeddings`` [num_tokens, hidden]."""

    def entered(self, layer: int, router_input: torch.Tensor) -> None:
        """``layer`` is about to run on ``router_input`` [num_tokens, hidden]."""

    def computed(
        self,
        layer: int,
        index: torch.Tensor,
        weights: torch.Tensor,
        lookups: dict[ExpertId, Lookup],
        stall_seconds: float,
        predicted: list[tuple[int, float]],
    ) -> None:
        """``layer`` ran: what was chosen, found, waited for, and what had been predicted of it."""


class ExpertRuntime:
    """Runs the experts of a model whose experts live elsewhere. One inference thread; not re-entrant.

    Law 1: an expert's output depends on its tokens alone and is stored by (token, choice) row; rows are reduced in routing order.
    So neither the order of arrival nor the number of slots changes a bit.
    """

    def __init__(
        self,
        residency: Residency,
        predictor: Predictor,
        routers: Sequence[Router | None],
        slots: SlotExperts,
        *,
        num_experts: Sequence[int],
        view_selector: ViewSelector,
        look_ahead: int = 1,
    ) -> None:
        self.residency = residency
        self.view_selector = view_selector
        self._prefetcher = Prefetcher(residency, predictor, len(routers), look_ahead=look_ahead)
        self._routers = routers
        self._slots = slots
        self._num_experts = num_experts
        self._claim: tuple[int, torch.Tensor, dict[int, list[int]], Lease] | None = None
        self.observer: Observer | None = None

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A forward pass begins on these ``embeddings`` [..., hidden]: layer 0 may be read ahead."""
        flat = embeddings.reshape(-1, embeddings.shape[-1])
        if self.observer is not None:
            self.observer.embedded(flat)
        self._prefetcher.embedded(flat)

    def enter(self, layer: int, router_input: torch.Tensor) -> None:
        """MoE block ``layer`` is about to run on ``router_input`` [..., hidden]: start its reads, then those of the next block."""
        hidden = router_input.reshape(-1, router_input.shape[-1])
        if self.observer is not None:
            self.observer.entered(layer, hidden)
        self._prefetcher.entered(layer, hidden.shape[0])
        route = self._routers[layer]
        if route is not None:
            routing = route(hidden)
            self._acquire(layer, routing.experts, routing)
        self._prefetcher.look_ahead(layer, hidden)

    def compute(
        self, layer: int, experts: Any, hidden: torch.Tensor, index: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, [num_tokens, hidden].

        ``experts`` is the transformers module, ``hidden`` [num_tokens, hidden], ``index`` and ``routing_weights``
        [num_tokens, top_k]. Raises StoreError if an expert cannot be read whole.
        """
        rows, lease = self._acquire(layer, index, routing_weights)
        stalled = self.residency.counters.stall_seconds
        outputs = self._slots.outputs(layer, experts, hidden, index.numel())  # by (token, choice)
        try:
            for arrived in lease.batches():
                ready = [(expert.expert, slot) for expert, slot in arrived]
                planes = {expert.expert: self.view_selector.num_planes(expert) for expert, _ in arrived}
                self._slots.run(layer, experts, ready, rows, hidden, outputs, planes)
        finally:
            lease.release()
            self._claim = None
        if self.observer is not None:
            stall = self.residency.counters.stall_seconds - stalled
            said = self._prefetcher.predicted.get(layer, [])
            self.observer.computed(layer, index, routing_weights, lease.lookups, stall, said)
        self._prefetcher.observe(layer, list(rows))
        return self._slots.combine(outputs, routing_weights.reshape(index.shape), hidden)

    def begin(self, layer: int, hidden: torch.Tensor, chosen: Sequence[int], weights: torch.Tensor) -> Lease:
        """``enter`` for one token whose router has chosen: ``hidden`` [1, hidden] goes to the experts ``chosen`` of ``layer``.

        ``weights`` begins with their gate weights.
        """
        self._prefetcher.entered(layer, 1)
        if self._claim is not None:
            self._claim[3].release()
        sections = None
        if self.view_selector.policy is not None:
            rows = {expert: (row,) for row, expert in enumerate(chosen)}
            sections = self.view_selector.sections(layer, rows, weights, self._prefetcher.affordable(1))
        lease = self.residency.acquire([ExpertId(layer, expert) for expert in chosen], sections=sections)
        self._claim = (-1, hidden, {}, lease)  # for whoever comes next, if this pass is cut short
        self._prefetcher.look_ahead(layer, hidden)
        return lease

    def run(self, layer: int, experts: Any, lease: Lease, chosen: Sequence[int], hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """``compute`` after ``begin``, without the sum: the output of ``chosen[i]`` to ``rows[i]``, fp32 [len(chosen), hidden]."""
        whole = self.view_selector.policy is None  # which is counted for all at once
        try:
            for arrived in lease.batches():
                places = [(chosen.index(expert.expert), slot) for expert, slot in arrived]
                planes = None if whole else [self.view_selector.num_planes(expert) for expert, _ in arrived]
                self._slots.run_token(layer, experts, chosen, places, hidden, rows, planes)
        finally:
            lease.release()
            self._claim = None
        if whole:
            self.view_selector.count_whole(layer, chosen)
        self._prefetcher.observe(layer, chosen)

    def can_step(self, layer: int, experts: Any) -> bool:
        """Whether ``begin`` and ``run`` do: the layer's experts have fused kernels, and nobody looks on."""
        return self.observer is None and self._slots.has_fused(layer, experts)

    def _acquire(self, layer: int, index: torch.Tensor, weighing: Routing | torch.Tensor) -> tuple[dict[int, list[int]], Lease]:
        """The lease on the experts in ``index``: the one already held where the routing is the same, else a new one.

        ``weighing`` has their gate weights, or the scores that these come from.
        """
        if self._claim is not None:
            held_layer, held_index, rows, lease = self._claim
            if held_layer == layer and torch.equal(held_index, index):
                return rows, lease
            lease.release()  # a forward pass that was cut short, or a router whose real call differs from ours
        rows = rows_by_expert(index, self._num_experts[layer])
        counts = None if len(index) == 1 else [len(chosen) for chosen in rows.values()]
        sections = self.view_selector.sections(layer, rows, weighing, self._prefetcher.affordable(len(index)))
        lease = self.residency.acquire([ExpertId(layer, expert) for expert in rows], counts, len(index), sections=sections)
        self._claim = (layer, index, rows, lease)
        return rows, lease

    def close(self) -> None:
        """Stop reading and give the slots back; the model cannot run afterwards."""
        self.residency.close()
