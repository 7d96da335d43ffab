"""The bound that no policy without prefetch can beat: evict what is needed furthest in the future. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from fate_moe.core import EvictionPolicy, ExpertId
from fate_moe.trace.schema import RoutingTrace

__all__ = ["Belady"]


class Belady(EvictionPolicy):
    """Belady's offline rule (IBM Systems Journal, 1966) for one trace; ``routed`` must follow the trace from its beginning."""

    def __init__(self, trace: RoutingTrace) -> None:
        num_tokens, num_layers, top_k = trace.experts.shape
        upcoming = np.full((num_layers, int(trace.num_experts.max())), num_tokens * num_layers, np.int64)
        following = np.empty((num_tokens, num_layers, top_k), np.int64)
        layers = np.arange(num_layers)[:, None]
        for token in range(num_tokens - 1, -1, -1):
            chosen = trace.experts[token].astype(np.int64)
            following[token] = upcoming[layers, chosen]
            upcoming[layers, chosen] = token * num_layers + layers
        self._experts = trace.experts.reshape(-1, top_k).tolist()
        self._following = following.reshape(-1, top_k).tolist()
        self._at = 0
        self._next: dict[ExpertId, int] = {
            ExpertId(layer, expert): int(upcoming[layer, expert])
            for layer in range(num_layers)
            for expert in range(upcoming.shape[1])
        }
        self._resident: set[ExpertId] = set()
        self._heap: list[tuple[int, ExpertId]] = []  # (-next use, expert); one that is not up to date is dead

    def routed(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, num_tokens: int = 1) -> None:
        for expert, following in zip(self._experts[self._at], self._following[self._at], strict=True):
            used = ExpertId(layer, expert)
            self._next[used] = following
            if used in self._resident:
                heapq.heappush(self._heap, (-following, used))
        self._at += 1

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._resident.add(expert)
        heapq.heappush(self._heap, (-self._next[expert], expert))

    def touched(self, expert: ExpertId) -> None:
        pass

    def removed(self, expert: ExpertId) -> None:
        self._resident.remove(expert)

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        passed_over, chosen = [], None
        while self._heap and chosen is None:
            following, expert = self._heap[0]
            if expert not in self._resident or self._next[expert] != -following:
                heapq.heappop(self._heap)
            elif evictable(expert):
                chosen = expert
            else:
                passed_over.append(heapq.heappop(self._heap))
        for entry in passed_over:
            heapq.heappush(self._heap, entry)
        return chosen
