"""Adaptive replacement. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain

from fate_moe.core import EvictionPolicy, ExpertId

__all__ = ["ARC"]

_Queue = OrderedDict[ExpertId, None]  # least recent first


class ARC(EvictionPolicy):
    """Adaptive Replacement Cache (Megiddo and Modha, FAST 2003, figure 4), for ``capacity`` slots.

    ``T1`` holds experts used once, ``T2`` those used again, ``B1`` and ``B2`` remember what either lost. ``p`` is the size that T1
    should have: a return from B1 says it is too small, one from B2 too large. What differs from the paper: its "request" comes in
    parts here (``victim``, ``removed``, ``admitted``, ``touched``), and a victim that is not evictable is passed over.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.p = 0.0
        self.t1: _Queue = OrderedDict()
        self.t2: _Queue = OrderedDict()
        self.b1: _Queue = OrderedDict()
        self.b2: _Queue = OrderedDict()
        self._new: set[ExpertId] = set()  # admitted, not touched yet: the first touch is the use that brought it
        self._adapted: tuple[ExpertId, float] | None = None  # p for an incoming expert, from before its victim became a ghost

    def __len__(self) -> int:
        return len(self.t1) + len(self.t2)

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        known = self._adapted is not None and self._adapted[0] == expert
        self.p = self._adapted[1] if known and self._adapted else self._adapt(expert)
        self._adapted = None
        returning = expert in self.b1 or expert in self.b2
        self.b1.pop(expert, None)
        self.b2.pop(expert, None)
        queue = self.t2 if returning else self.t1
        queue[expert] = None
        queue.move_to_end(expert, last=not prefetched)  # one that nobody asks for is the first to go
        self._new.add(expert)
        while self.b1 and len(self.t1) + len(self.b1) > self.capacity:
            self.b1.popitem(last=False)
        while self.b2 and len(self) + len(self.b1) + len(self.b2) > 2 * self.capacity:
            self.b2.popitem(last=False)

    def touched(self, expert: ExpertId) -> None:
        if expert in self._new:
            self._new.discard(expert)
            (self.t1 if expert in self.t1 else self.t2).move_to_end(expert)
            return
        self.t1.pop(expert, None)
        self.t2[expert] = None
        self.t2.move_to_end(expert)

    def removed(self, expert: ExpertId) -> None:
        self._new.discard(expert)
        if expert in self.t1:
            del self.t1[expert]
            self.b1[expert] = None
        else:
            del self.t2[expert]
            self.b2[expert] = None

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        p = self._adapt(incoming)
        self._adapted = (incoming, p)
        over = len(self.t1) > p or (incoming in self.b2 and len(self.t1) == p)
        return next(filter(evictable, self._by_age(recent_first=over and bool(self.t1))), None)

    def _by_age(self, recent_first: bool) -> Iterator[ExpertId]:
        return chain(self.t1, self.t2) if recent_first else chain(self.t2, self.t1)

    def _adapt(self, incoming: ExpertId) -> float:
        if incoming in self.b1:
            return min(self.p + max(len(self.b2) / len(self.b1), 1.0), float(self.capacity))
        if incoming in self.b2:
            return max(self.p - max(len(self.b1) / len(self.b2), 1.0), 0.0)
        return self.p
