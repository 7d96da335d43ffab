"""Experts in use: what an inference thread holds of the residency while a layer computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fate_moe.core import ExpertId, Lookup

if TYPE_CHECKING:
    from fate_moe.memory.residency import Residency

__all__ = ["WHOLE", "Lease"]

WHOLE = 1 << 30  # sections: more than any blob has


class Lease:
    """Experts that are locked for use. Iterate once, to the end or until ``release``; at most one unreleased lease per thread.

    Iteration gives ``(expert, slot)``: those that were resident first, in the order asked for, then the others as they arrive. An
    expert is unlocked when the loop asks for the next one, so that more experts than there are slots can be leased. Raises the
    source's error (StoreError, CorruptExpertError) at the expert that cannot be read.
    """

    def __init__(self, residency: Residency, lookups: dict[ExpertId, Lookup], wanted: Mapping[ExpertId, int]) -> None:
        self.lookups = lookups
        self._wanted = wanted
        self._residency = residency
        self.arrived: deque[tuple[ExpertId, Exception | None]] = deque()
        self.held = dict.fromkeys(lookups)
        self.asked: float | None = time.perf_counter()  # None once what was missing has been needed

    def __iter__(self) -> Iterator[tuple[ExpertId, int]]:
        hits = [expert for expert, found in self.lookups.items() if found is Lookup.HIT]
        for expert in hits:
            if expert in self.held:
                yield expert, self._residency.slot_of(expert)
                self._unlock(expert)
        for _ in range(len(self.lookups) - len(hits)):
            expert = self._residency.wait_for(self)
            yield expert, self._residency.slot_of(expert)
            self._unlock(expert)

    def wanted(self, expert: ExpertId) -> int:
        """How many sections of ``expert``'s blob are enough."""
        return self._wanted.get(expert, WHOLE)

    def batches(self) -> Iterator[list[tuple[ExpertId, int]]]:
        """The same in lists, each unlocked when the next is asked for: all that were resident, then those that have arrived."""
        hits = [expert for expert, found in self.lookups.items() if found is Lookup.HIT and expert in self.held]
        if hits:
            yield [(expert, self._residency.slot_of(expert)) for expert in hits]
            self._residency.unlock(self, [expert for expert in hits if expert in self.held])
        missing = len(self.lookups) - len(hits)
        while missing:
            arrived = [self._residency.wait_for(self)]
            while self.arrived:
                arrived.append(self._residency.wait_for(self))
            missing -= len(arrived)
            yield [(expert, self._residency.slot_of(expert)) for expert in arrived]
            self._residency.unlock(self, [expert for expert in arrived if expert in self.held])

    def arrivals(self) -> Iterator[tuple[ExpertId, int]]:
        """The same one by one, all of them locked until ``release``: there must be as many slots."""
        hits = [expert for expert, found in self.lookups.items() if found is Lookup.HIT]
        yield from ((expert, self._residency.slot_of(expert)) for expert in hits)
        for _ in range(len(self.lookups) - len(hits)):
            expert = self._residency.wait_for(self)
            yield expert, self._residency.slot_of(expert)

    def release(self) -> None:
        """Unlock what is left and withdraw the demand reads that have not begun. May be called again."""
        if self.held:
            self._residency.unlock(self, list(self.held))

    def _unlock(self, expert: ExpertId) -> None:
        if expert in self.held:
            self._residency.unlock(self, [expert])
