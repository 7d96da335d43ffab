"""Residency in virtual time: the rules of memory.residency with one link whose reads take a known time. No torch, no threads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from fate_moe.core import Counters, EvictionPolicy, ExpertId

__all__ = ["VirtualResidency"]


class VirtualResidency:
    """``num_slots`` slots behind a link that is busy for ``transfer_seconds`` with one expert after another; each can be used
    ``latency_seconds`` after that.

    The caller moves ``now``. Demand reads go first: no prefetch begins while one is awaited, one that has begun is finished. As in
    the real one, prefetches still queued when their layer asks are dropped, what is expected or prefetched is *fresh* until then,
    and a prefetch takes no slot of a fresh expert or of one in flight.
    """

    def __init__(
        self, policy: EvictionPolicy, num_slots: int, transfer_seconds: float, expert_bytes: int, latency_seconds: float = 0.0
    ) -> None:
        self.counters = Counters()
        self.read_seconds = transfer_seconds + latency_seconds  # one alone
        self._transfer, self._latency = transfer_seconds, latency_seconds
        self.now = 0.0
        self._policy = policy
        self._free = num_slots
        self._expert_bytes = expert_bytes
        self._arrives: dict[ExpertId, float] = {}  # who has a slot, and since or from when its bytes are there
        self._link_free = 0.0
        self._queue: OrderedDict[ExpertId, tuple[float, float]] = OrderedDict()  # prefetches: since when, how likely
        self._fresh: dict[int, set[ExpertId]] = {}
        self._unused: set[ExpertId] = set()

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """What the lookups find (0 hit, 1 in flight, 2 miss) as ``layer`` asks; moves ``now`` to when all have arrived."""
        self._link_works()
        for queued in [expert for expert in self._queue if expert.layer == layer]:
            del self._queue[queued]
        counters, policy, arrives, now = self.counters, self._policy, self._arrives, self.now
        policy.routed(layer, experts)
        wanted = [ExpertId(layer, expert) for expert in experts]
        found, missing, last = [], [], now
        for expert in wanted:
            arrival = arrives.get(expert)
            if arrival is None:
                found.append(2)
                missing.append(expert)
                continue
            policy.touched(expert)
            if expert in self._unused:
                self._unused.discard(expert)
                counters.prefetch_used += 1
            found.append(1 if arrival > now else 0)
            last = max(last, arrival)
        self._fresh.pop(layer, None)
        locked = set(wanted)
        for expert in missing:
            self._take_slot(expert, locked)
            policy.touched(expert)
            self._link_free = max(self._link_free, now) + self._transfer
            arrives[expert] = self._link_free + self._latency
        if missing:
            last = self._link_free + self._latency
            counters.bytes_read += len(missing) * self._expert_bytes
        counters.misses += len(missing)
        counters.in_flight += found.count(1)
        counters.hits += found.count(0)
        counters.stall_seconds += last - now
        self._idle_from(last)
        self.now = last
        return found

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        """As Residency.prefetch."""
        queued = 0
        for index, expert in enumerate(expected):
            arrival = self._arrives.get(expert)
            if arrival is not None:
                if arrival <= self.now:
                    self._fresh.setdefault(expert.layer, set()).add(expert)
            elif (most is None or queued < most) and expert not in self._queue:
                self._queue[expert] = (self.now, 1.0 if probabilities is None else probabilities[index])
                queued += 1
        return queued

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        """As Residency.missing."""
        return [expert not in self._arrives for expert in experts]

    def cancel_prefetches(self) -> None:
        """As Residency.cancel_prefetches."""
        self._link_works()
        self._queue.clear()

    def _idle_from(self, when: float) -> None:
        """Nobody waits any more: queued prefetches may begin from ``when`` on."""
        for expert, (since, probability) in self._queue.items():
            self._queue[expert] = (max(since, when), probability)

    def _link_works(self) -> None:
        """Begin the prefetches that begin before ``now``."""
        while self._queue:
            expert, (since, probability) = next(iter(self._queue.items()))
            begins = max(self._link_free, since)
            if begins >= self.now:
                return
            if not self._take_slot(expert, (), begins, probability):
                return
            del self._queue[expert]
            self._link_free = begins + self._transfer
            self._arrives[expert] = self._link_free + self._latency
            self._unused.add(expert)
            self._fresh.setdefault(expert.layer, set()).add(expert)
            self.counters.prefetched += 1
            self.counters.bytes_read += self._expert_bytes

    def _take_slot(
        self, incoming: ExpertId, locked: set[ExpertId] | tuple[()], begins: float | None = None, probability: float = 1.0
    ) -> bool:
        """A slot for a demand read, or for a prefetch that ``begins`` then; False if a prefetch finds none."""
        if self._free:
            self._free -= 1
        else:
            arrives, fresh, when = self._arrives, self._fresh, self.now if begins is None else begins

            def stale(expert: ExpertId) -> bool:
                return expert not in locked and arrives[expert] <= when and expert not in fresh.get(expert.layer, ())

            victim = self._policy.victim(incoming, stale, probability)
            if victim is None and begins is None:
                victim = self._policy.victim(incoming, lambda expert: expert not in locked and arrives[expert] <= when)
            if victim is None and begins is None:  # more are wanted than there are slots: the first to arrive is done with
                victim = self._policy.victim(incoming, lambda expert: expert != incoming)
            if victim is None:
                return False
            self._policy.removed(victim)
            del arrives[victim]
            self._unused.discard(victim)
            if victim.layer in fresh:
                fresh[victim.layer].discard(victim)
        self._policy.admitted(incoming, prefetched=begins is not None)
        return True
