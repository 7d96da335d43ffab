"""What the experts of a running model do, looked at from another thread.

The journal (journal.py) records every pass and costs the inference thread time. This reads what the engine counts anyway, so a
model that is watched takes the same path as one that is not: only the experts that missed are recorded meanwhile.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fate_moe.core import Counters, ExpertId
from fate_moe.memory.residency import Residency
from fate_moe.memory.view_selector import ViewSelector

__all__ = ["Activity", "Look"]

_MOST_MISSES = 4096  # that are kept between two looks; of more, the latest


class Look(NamedTuple):
    """``uses``: how often each expert was computed since loading, layer after layer. ``missed``: the lookups that missed since the
    look before, in order. ``resident``: the experts in slots, None if they are those of the look before."""

    uses: array[int]
    missed: list[ExpertId]
    resident: list[ExpertId] | None
    counters: Counters


class Activity:
    """Looks at one engine. ``start``, ``look`` and ``stop`` are called by one thread, which need not be the inference thread."""

    def __init__(self, residency: Residency, view_selector: ViewSelector, num_experts: Sequence[int]) -> None:
        """``num_experts`` by layer."""
        self.num_experts = tuple(num_experts)
        self._residency, self._view_selector = residency, view_selector
        self._seen: tuple[int, int] | None = None

    def start(self) -> None:
        """Begin to write down what misses."""
        self._seen = None
        self._residency.missed = deque(maxlen=_MOST_MISSES)

    def stop(self) -> None:
        """Nothing is written down any more."""
        self._residency.missed = None

    def resident(self) -> list[ExpertId]:
        """The experts in slots. May be called from any thread, at any time."""
        return self._residency.resident()

    def look(self) -> Look:
        """What there is now. Takes a copy of the counts, and the residency's lock where reads have changed what is resident."""
        counters = replace(self._residency.counters)
        seen = (counters.misses + counters.prefetched, counters.bytes_read)
        resident = None if seen == self._seen else self.resident()
        self._seen = seen
        pending = self._residency.missed
        missed = [pending.popleft() for _ in range(len(pending))] if pending else []
        return Look(self._view_selector.uses(), missed, resident, counters)
