"""Residency in plain Python, over a policy that orders experts: what the residency kernels must do, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fate_moe.core import EvictionPolicy, ExpertId

__all__ = ["DecayedFrequency", "Residency"]


class DecayedFrequency:
    """An EvictionPolicy: the lowest sum over uses of 2^(time / half_life) goes first, among equals the lowest expert."""

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

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool]) -> ExpertId | None:
        candidates = (expert for expert in self._admitted if evictable(expert))
        return min(candidates, key=lambda expert: (self._scores.get(expert, 0.0), expert), default=None)


class Residency:
    """Experts of some layers in slots; each layer has a policy and always ``quotas[layer]`` residents."""

    def __init__(self, quotas: Sequence[int], policies: Sequence[EvictionPolicy]) -> None:
        self.slot_of: dict[ExpertId, int] = {}
        self.policies = policies
        self.counters = [[0, 0, 0, 0, 0] for _ in quotas]  # hits, misses, prefetched, prefetches used, computed on the host
        self._unused: set[ExpertId] = set()
        self.under_way: set[ExpertId] = set()  # prefetched since their layer ran: their slots are being written
        for layer, quota in enumerate(quotas):
            for number in range(quota):
                self.slot_of[ExpertId(layer, number)] = len(self.slot_of)
            for number in reversed(range(quota)):  # never used, the lowest first to go, as the device's tables begin
                policies[layer].admitted(ExpertId(layer, number), prefetched=True)

    def step(self, layer: int, routed: set[int], touch: bool = True) -> list[tuple[ExpertId, int]]:
        """The router has spoken: who must be fetched to which slot."""
        chosen = [ExpertId(layer, number) for number in sorted(routed)]
        missing = [expert for expert in chosen if expert not in self.slot_of]
        counters = self.counters[layer]
        counters[0] += len(chosen) - len(missing)
        counters[1] += len(missing)
        counters[3] += len(self._unused & set(chosen))
        self._unused -= set(chosen)
        kept = set(chosen) | self.under_way
        self.pending = {expert.expert for expert in chosen if expert in missing or expert in self.under_way}
        wanted = [(expert, self._replace(expert, kept, prefetched=False)) for expert in missing]
        self.under_way = {expert for expert in self.under_way if expert.layer != layer}
        for expert in chosen if touch else ():
            self.policies[layer].touched(expert)
        return wanted

    def prefetch(self, layer: int, likeliest: Sequence[int], limit: int) -> list[tuple[ExpertId, int]]:
        """``likeliest`` are expected, the likeliest first: who is fetched ahead to which slot, at most ``limit``."""
        expected = {ExpertId(layer, number) for number in likeliest}
        missing = [ExpertId(layer, number) for number in likeliest if ExpertId(layer, number) not in self.slot_of]
        room = sum(expert.layer == layer and expert not in expected for expert in self.slot_of)
        wanted = [(expert, self._replace(expert, expected, prefetched=True)) for expert in missing[: min(limit, room)]]
        self._unused |= {expert for expert, _ in wanted}
        self.under_way = {expert for expert in self.under_way if expert.layer != layer} | {expert for expert, _ in wanted}
        self.counters[layer][2] += len(wanted)
        return wanted

    def _replace(self, incoming: ExpertId, kept: set[ExpertId], prefetched: bool) -> int:
        policy = self.policies[incoming.layer]
        victim = policy.victim(incoming, lambda expert: expert not in kept)
        assert victim is not None
        policy.removed(victim)
        self._unused.discard(victim)
        slot = self.slot_of.pop(victim)
        self.slot_of[incoming] = slot
        policy.admitted(incoming, prefetched=prefetched)
        return slot
