"""One token's way through one MoE block: route -> acquire -> (prefetch the next) -> compute -> release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fate_moe.core import BlobLayout, ExpertId, Predictor, Routing
from fate_moe.kernels.reference import expert_mlp, expert_weights
from fate_moe.memory.residency import Lease, Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.prefetch import Prefetcher
from fate_moe.quant.blob import views
from fate_moe.tailor import Tailor

__all__ = ["ExpertRuntime", "Router", "SlotWeights", "rows_by_expert"]

Router = Callable[[torch.Tensor], Routing]


def rows_by_expert(index: torch.Tensor, num_experts: int) -> dict[int, torch.Tensor]:
    """The rows of ``index.reshape(-1)`` that chose each expert, most chosen expert first, ties in routing order.

    ``index`` [num_tokens, top_k] int64. Entries outside 0..num_experts-1 (families mask choices so) belong to no expert.
    """
    flat = index.reshape(-1)
    choices = flat.tolist()
    first = {expert: row for row, expert in reversed(list(enumerate(choices))) if 0 <= expert < num_experts}
    if len(first) == len(choices):  # decode: every choice once
        return {expert: torch.tensor([row]) for expert, row in sorted(first.items(), key=lambda item: item[1])}
    flat = flat.where((flat >= 0) & (flat < num_experts), num_experts)
    counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    groups = torch.split(torch.argsort(flat, stable=True), counts)
    popular = sorted(first, key=lambda expert: (-counts[expert], first[expert]))
    return {expert: groups[expert] for expert in popular}


class SlotWeights:
    """The slots' bytes as experts' parameters, by layer and slot; quantized ones are unpacked at each use."""

    def __init__(self, arena: SlotArena, layouts: Sequence[BlobLayout], shapes: Sequence[dict[str, tuple[int, ...]]]) -> None:
        """``layouts`` and ``shapes`` (parameter name to [out, in] or [out]) by layer."""
        self._memory = torch.frombuffer(arena.buffer, dtype=torch.uint8)
        self._slot_bytes = arena.slot_bytes
        self._layouts = layouts
        self._shapes = shapes
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}  # making them costs 10 us a part, so they are kept

    def of(self, layer: int, slot: int, dtype: torch.dtype, num_planes: int | None = None) -> dict[str, torch.Tensor]:
        """The parameters of the expert in ``slot``, from its first ``num_planes`` planes (None: all there are)."""
        layout = self._layouts[layer]
        parts = self._views.get((id(layout), slot))
        if parts is None:
            start = slot * self._slot_bytes
            parts = self._views[id(layout), slot] = views(layout, self._memory[start : start + layout.length])
        return expert_weights(layout, parts, self._shapes[layer], dtype, num_planes)


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
        weights: SlotWeights,
        *,
        num_experts: Sequence[int],
        tailor: Tailor,
    ) -> None:
        self.residency = residency
        self.tailor = tailor
        self._prefetcher = Prefetcher(residency, predictor, len(routers))
        self._routers = routers
        self._weights = weights
        self._num_experts = num_experts
        self._claim: tuple[int, torch.Tensor, dict[int, torch.Tensor], Lease] | None = None

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A forward pass begins on these ``embeddings`` [..., hidden]: layer 0 may be read ahead."""
        self._prefetcher.embedded(embeddings.reshape(-1, embeddings.shape[-1]))

    def enter(self, layer: int, gate_input: torch.Tensor) -> None:
        """MoE block ``layer`` is about to run on ``gate_input`` [..., hidden]: start its reads, then those of the next block."""
        hidden = gate_input.reshape(-1, gate_input.shape[-1])
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
        num_tokens, top_k = index.shape
        rows, lease = self._acquire(layer, index, routing_weights)
        outputs = hidden.new_zeros(num_tokens * top_k, hidden.shape[-1])  # by (token, choice)
        try:
            for expert, slot in lease:
                chosen = rows[expert.expert]
                x = hidden if num_tokens == 1 else hidden[chosen // top_k]
                weights = self._weights.of(layer, slot, hidden.dtype, self.tailor.num_planes(expert))
                outputs[chosen] = expert_mlp(experts, weights, x)
        finally:
            lease.release()
            self._claim = None
        self._prefetcher.observe(layer, list(rows))
        weighted = outputs.view(num_tokens, top_k, -1) * routing_weights.reshape(num_tokens, top_k, 1)
        return weighted.sum(1).to(hidden.dtype)

    def _acquire(self, layer: int, index: torch.Tensor, weighing: Routing | torch.Tensor) -> tuple[dict[int, torch.Tensor], Lease]:
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
        sections = self.tailor.sections(layer, rows, weighing, self._prefetcher.affordable(len(index)))
        lease = self.residency.acquire([ExpertId(layer, expert) for expert in rows], counts, len(index), sections=sections)
        self._claim = (layer, index, rows, lease)
        return rows, lease

    def close(self) -> None:
        """Stop reading and give the slots back; the model cannot run afterwards."""
        self.residency.close()
