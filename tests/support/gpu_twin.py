"""Residency in plain Python, over a policy that orders experts: what the residency kernels must do, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from fate_moe.core import EvictionPolicy, ExpertId, Lookup
from fate_moe.memory.table import SlotTable

__all__ = ["DecayedFrequency", "Residency"]


class DecayedFrequency(EvictionPolicy):
    """The lowest sum over uses of 2^(time / half_life) goes first, among equals the lowest expert. The caller moves ``now``."""

    def __init__(self, half_life: float) -> None:
        self.now = 0
        self._half_life = half_life
        self._scores: dict[ExpertId, float] = {}
        self._admitted: set[ExpertId] = set()

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._admitted.add(expert)

    def touched(self, expert: ExpertId) -> None:
        self._scores[expert] = math.log2(2 ** self._scores.get(expert, 0.0) + 2 ** (self.now / self._half_life))

    def weigh(self, layer: int, weights: Sequence[float]) -> None:
        """Every expert of ``layer`` was used so much."""
        for number, weight in enumerate(weights):
            expert = ExpertId(layer, number)
            use = weight * 2 ** (self.now / self._half_life)
            self._scores[expert] = math.log2(2 ** self._scores.get(expert, 0.0) + use)

    def removed(self, expert: ExpertId) -> None:
        self._admitted.remove(expert)

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        candidates = (expert for expert in self._admitted if evictable(expert))
        return min(candidates, key=lambda expert: (self._scores.get(expert, 0.0), expert), default=None)


class _TouchedLater(EvictionPolicy):
    """``policy`` without uses: the kernels count a layer's uses all at once, in the order of experts."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._policy.admitted(expert, prefetched=prefetched)

    def touched(self, expert: ExpertId) -> None:
        return

    def removed(self, expert: ExpertId) -> None:
        self._policy.removed(expert)

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        return self._policy.victim(incoming, evictable, probability)


class Residency:
    """Experts in a table whose slot classes are the layers; each layer always has ``quotas[layer]`` residents."""

    def __init__(self, quotas: Sequence[int], num_experts: int, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.counters = [[0, 0, 0, 0, 0] for _ in quotas]  # hits, misses, prefetched, prefetches used, computed on the host
        self.pending: set[int] = set()  # experts of the layer that ran last whose slots are still being written
        classes = {ExpertId(layer, number): layer for layer in range(len(quotas)) for number in range(num_experts)}
        self._table = SlotTable(_TouchedLater(policy), [layer for layer, quota in enumerate(quotas) for _ in range(quota)], classes)
        self._under_way: list[ExpertId] = []  # prefetched since their layer ran
        for expert, layer in classes.items():
            if expert.expert < quotas[layer]:  # never used, the lowest first to go, as the device's tables begin
                self._table.begin(expert)
                self._table.finish(expert)

    @property
    def slot_of(self) -> dict[ExpertId, int]:
        """The slot of every expert that has one."""
        return self._table.slots()

    def step(self, layer: int, routed: set[int], touch: bool = True) -> list[tuple[ExpertId, int]]:
        """After routing: the experts that must be fetched, each with its slot."""
        chosen, table, before = [ExpertId(layer, number) for number in sorted(routed)], self._table, replace(self._table.counters)
        found = table.route(chosen)
        self.pending = {expert.expert for expert, lookup in found.items() if lookup is not Lookup.HIT}
        table.lock(chosen)
        wanted = [(expert, self._begin(expert)) for expert, lookup in found.items() if lookup is Lookup.MISS]
        table.unlock(chosen)
        for expert in [expert for expert in self._under_way if expert.layer == layer] + [expert for expert, _ in wanted]:
            table.finish(expert)
        self._under_way = [expert for expert in self._under_way if expert.layer != layer]
        for expert in chosen if touch else ():
            self.policy.touched(expert)
        spent = table.counters.since(before)
        counters = self.counters[layer]
        counters[0] += spent.hits + spent.in_flight
        counters[1] += spent.misses
        counters[3] += spent.prefetch_used
        return wanted

    def prefetch(self, layer: int, likeliest: Sequence[int], limit: int) -> list[tuple[ExpertId, int]]:
        """``likeliest`` are expected, the likeliest first: those fetched ahead, at most ``limit``, each with its slot."""
        expected = [ExpertId(layer, number) for number in likeliest]
        wanted = []
        for index in self._table.expect(expected)[:limit]:
            if (slot := self._table.begin(expected[index], demand=False)) is not None:
                wanted.append((expected[index], slot))
        self._under_way += [expert for expert, _ in wanted]
        self.counters[layer][2] += len(wanted)
        return wanted

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the table's books agree."""
        self._table.check_integrity()

    def _begin(self, expert: ExpertId) -> int:
        slot = self._table.begin(expert)
        assert slot is not None
        return slot
