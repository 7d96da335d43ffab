"""Which expert gives up its slot: what registry.py makes by name, and the three simple policies. No torch."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence

from fate_moe.core import EvictionPolicy, ExpertId
from fate_moe.memory.arc import ARC
from fate_moe.memory.decayed import Decayed
from fate_moe.memory.shallow import ShallowARC

__all__ = ["LFU", "LRU", "LeastStale"]


# What the registry makes: (num_slots, experts_per_layer) -> policy.


def lru(num_slots: int, experts_per_layer: Sequence[int]) -> EvictionPolicy:
    return LRU()


def lfu(num_slots: int, experts_per_layer: Sequence[int]) -> EvictionPolicy:
    return LFU(half_life=8 * num_slots)


def arc(num_slots: int, experts_per_layer: Sequence[int]) -> EvictionPolicy:
    return ARC(num_slots)


def shallow_arc(num_slots: int, experts_per_layer: Sequence[int]) -> EvictionPolicy:
    return ShallowARC(num_slots, experts_per_layer)


def least_stale(num_slots: int, experts_per_layer: Sequence[int]) -> EvictionPolicy:
    return LeastStale()


def decayed(num_slots: int, experts_per_layer: Sequence[int]) -> EvictionPolicy:
    return Decayed(experts_per_layer, co_activation=False)


def co_activation(num_slots: int, experts_per_layer: Sequence[int]) -> EvictionPolicy:
    return Decayed(experts_per_layer, co_activation=True)


class LRU(EvictionPolicy):
    """The least recently used goes first; a prefetched expert counts as never used until it is asked for."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertId, None] = OrderedDict()

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._order[expert] = None
        self._order.move_to_end(expert, last=not prefetched)

    def touched(self, expert: ExpertId) -> None:
        self._order.move_to_end(expert)

    def removed(self, expert: ExpertId) -> None:
        del self._order[expert]

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        return next(filter(evictable, self._order), None)


class LeastStale(EvictionPolicy):
    """What this pass has used or prefetched stays; of what is left from the pass before, the least recently used goes first.

    A pass begins when a layer is routed that is no later than the one before. If nothing stale is evictable, the
    shallowest layer's experts go: it will be longest until they are needed again.
    """

    def __init__(self) -> None:
        self._stale: OrderedDict[ExpertId, None] = OrderedDict()
        self._current: OrderedDict[ExpertId, None] = OrderedDict()
        self._layer = -1

    def routed(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, num_tokens: int = 1) -> None:
        if layer <= self._layer:
            self._stale.update(self._current)
            self._current.clear()
        self._layer = layer

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._current[expert] = None

    def touched(self, expert: ExpertId) -> None:
        self.removed(expert)
        self._current[expert] = None

    def removed(self, expert: ExpertId) -> None:
        del (self._current if expert in self._current else self._stale)[expert]

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        victim = next(filter(evictable, self._stale), None)
        return min(filter(evictable, self._current), default=None) if victim is None else victim


class LFU(EvictionPolicy):
    """The least frequently used goes first, where a use counts half as much ``half_life`` uses (of any expert) later.

    Counts outlive residency: one float per expert of the model. Instead of letting all scores decay, the weight of a new use grows;
    the order is the same (forward decay, Cormode et al., ICDE 2009). Ties go to the expert that was admitted first.
    """

    def __init__(self, half_life: int) -> None:
        self._growth = 2.0 ** (1.0 / half_life)
        self._use = 1.0
        self._scores: dict[ExpertId, float] = {}
        self._admissions: dict[ExpertId, int] = {}  # residents
        self._admitted = 0
        self._heap: list[tuple[float, int, ExpertId]] = []  # one entry per resident, its score may be too low; others are dead

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._admitted += 1
        self._admissions[expert] = self._admitted
        heapq.heappush(self._heap, (self._scores.setdefault(expert, 0.0), self._admitted, expert))

    def touched(self, expert: ExpertId) -> None:
        self._scores[expert] += self._use
        self._use *= self._growth
        if self._use > 1e150:
            self._rescale()

    def removed(self, expert: ExpertId) -> None:
        del self._admissions[expert]

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        passed_over, chosen = [], None
        while self._heap and chosen is None:
            score, admission, expert = self._heap[0]
            if self._admissions.get(expert) != admission:
                heapq.heappop(self._heap)
            elif score != self._scores[expert]:
                heapq.heapreplace(self._heap, (self._scores[expert], admission, expert))
            elif evictable(expert):
                chosen = expert
            else:
                passed_over.append(heapq.heappop(self._heap))
        for entry in passed_over:
            heapq.heappush(self._heap, entry)
        return chosen

    def _rescale(self) -> None:
        self._scores = {expert: score / self._use for expert, score in self._scores.items()}
        self._use = 1.0
        self._heap = [(self._scores[expert], admission, expert) for expert, admission in self._admissions.items()]
        heapq.heapify(self._heap)
