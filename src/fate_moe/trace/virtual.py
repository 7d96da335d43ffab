"""Residency in virtual time: the same table, with one link whose reads take a known time. No torch, no threads."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from fate_moe.core import EvictionPolicy, ExpertId, Lookup
from fate_moe.memory.table import SlotTable

__all__ = ["VirtualResidency"]

_HIT, _IN_FLIGHT = Lookup.HIT, Lookup.IN_FLIGHT


class VirtualResidency:
    """``num_slots`` slots behind a link that is busy for ``transfer_seconds`` with one expert after another; each can be used
    ``latency_seconds`` after that.

    The caller moves ``now``. Demand reads go first: no prefetch begins while one is awaited, one that has begun is finished.
    Prefetches still queued when their layer is routed are dropped. Which slot an expert gets is the table's to say
    (memory.table.SlotTable); a layer's experts are locked until all have arrived.
    """

    def __init__(
        self, policy: EvictionPolicy, num_slots: int, transfer_seconds: float, expert_bytes: int, latency_seconds: float = 0.0
    ) -> None:
        self.read_seconds = transfer_seconds + latency_seconds  # one alone
        self._transfer, self._latency = transfer_seconds, latency_seconds
        self.now = 0.0
        self._policy = policy
        self._table = SlotTable(policy, [0] * num_slots)
        self.counters = self._table.counters
        self._expert_bytes = expert_bytes
        self._in_flight: deque[tuple[float, ExpertId]] = deque()  # when each can be used, in that order
        self._link_free = 0.0
        self._queue: OrderedDict[ExpertId, tuple[float, float]] = OrderedDict()  # prefetches: since when, how likely
        self._ids: dict[int, list[ExpertId]] = {}  # by layer and expert

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """What the lookups find (0 hit, 1 in flight, 2 miss) as ``layer`` asks; moves ``now`` to when all have arrived."""
        now = self.now
        if self._queue:
            self._run_link()
            for queued in [expert for expert in self._queue if expert.layer == layer]:
                del self._queue[queued]
        self._arrive(now)
        found = self._table.route(self._experts(layer, experts))
        codes, ready, missing, last = [], [], [], now
        for expert, lookup in found.items():
            if lookup is _HIT:
                codes.append(0)
                ready.append(expert)
            elif lookup is _IN_FLIGHT:
                codes.append(1)
                last = max(last, self._arrival(expert))
            else:
                codes.append(2)
                missing.append(expert)
        if missing:
            last = self._read(ready, missing)
        self.counters.stall_seconds += last - now
        if self._queue:
            self._idle_from(last)
        self.now = last
        return codes

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        """As Residency.prefetch."""
        table, queue, now, queued = self._table, self._queue, self.now, 0
        for index in table.expect(expected):
            if most is not None and queued >= most:
                break
            if (expert := expected[index]) not in queue:
                queue[expert] = (now, 1.0 if probabilities is None else probabilities[index])
                queued += 1
        # Those that have arrived by now are resident, though the table hears of it when the link's prefetches have begun in order.
        for expert in {expert for arrival, expert in self._in_flight if arrival <= now}.intersection(expected):
            table.protect(expert)
        return queued

    @property
    def holds_all(self) -> bool:
        """See ``memory.portable``."""
        return self._table.holds_all

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        """As Residency.missing."""
        return self._table.missing(experts)

    def cancel_prefetches(self) -> None:
        """As Residency.cancel_prefetches."""
        self._run_link()
        self._queue.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the books agree."""
        self._table.check_integrity()
        if len(self._in_flight) != self._table.num_in_flight:
            raise RuntimeError("virtual residency: not so: what is in flight arrives")

    def _experts(self, layer: int, experts: Sequence[int]) -> list[ExpertId]:
        """The experts of ``layer``; each ExpertId is made once, since making one takes longer than looking it up."""
        ids = self._ids.setdefault(layer, [])
        try:
            return [ids[expert] for expert in experts]
        except IndexError:
            ids += [ExpertId(layer, expert) for expert in range(len(ids), max(experts) + 1)]
            return [ids[expert] for expert in experts]

    def _read(self, ready: list[ExpertId], missing: list[ExpertId]) -> float:
        """Demand reads of the ``missing``, while the ``ready`` are locked; when the last of them can be used."""
        table, in_flight, free = self._table, self._in_flight, max(self._link_free, self.now)
        table.lock(ready)
        for expert in missing:
            if table.begin(expert) is None:  # more are wanted than there are slots
                self._use_one(expert, ready)
                table.begin(expert)
            free += self._transfer
            in_flight.append((free + self._latency, expert))
        table.unlock(ready)
        self._link_free = free
        self.counters.bytes_read += len(missing) * self._expert_bytes
        return free + self._latency

    def _use_one(self, incoming: ExpertId, ready: list[ExpertId]) -> None:
        """Let one of those that are ``ready`` or in flight be used before the others, so that ``incoming`` finds a slot."""
        done = self._policy.victim(incoming, lambda expert: True)
        assert done is not None
        if done in ready:
            ready.remove(done)
            self._table.unlock([done])
        else:
            self._in_flight.remove((self._arrival(done), done))
            self._table.finish(done)

    def _arrival(self, expert: ExpertId) -> float:
        """When ``expert``, which is in flight, can be used."""
        return next(arrival for arrival, other in self._in_flight if other == expert)

    def _idle_from(self, when: float) -> None:
        """Nothing is awaited any more: queued prefetches may begin from ``when`` on."""
        for expert, (since, probability) in self._queue.items():
            self._queue[expert] = (max(since, when), probability)

    def _arrive(self, when: float) -> None:
        """What is in flight and arrives until ``when`` is resident."""
        in_flight = self._in_flight
        while in_flight and in_flight[0][0] <= when:
            self._table.finish(in_flight.popleft()[1])

    def _run_link(self) -> None:
        """Begin the prefetches that begin before ``now``."""
        while self._queue:
            expert, (since, probability) = next(iter(self._queue.items()))
            begins = max(self._link_free, since)
            if begins >= self.now:
                return
            self._arrive(begins)
            if self._table.begin(expert, demand=False, probability=probability) is None:
                return
            del self._queue[expert]
            self._link_free = begins + self._transfer
            self._in_flight.append((self._link_free + self._latency, expert))
            self.counters.bytes_read += self._expert_bytes
