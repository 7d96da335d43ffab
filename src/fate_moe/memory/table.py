"""Which expert has which slot: the rules of the expert cache, without threads, clock or bytes. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fate_moe.core import Counters, EvictionPolicy, ExpertId, Lookup

__all__ = ["WHOLE", "SlotTable"]

WHOLE = 1 << 30  # sections: more than any blob has

_HIT, _IN_FLIGHT, _MISS = Lookup.HIT, Lookup.IN_FLIGHT, Lookup.MISS


class SlotTable:
    """Slots, the experts in them, and the decisions about both; the owner of the bytes calls it as reads begin and end.

    State. An expert is *missing* (no slot), *in flight* (it has a slot that is being filled) or *resident*. Slots and experts have
    classes; an expert takes slots of its own class only. For each expert with a slot: the slot, and how many of its first sections
    the slot holds (``WHOLE``: all; 0 while its first read is in flight). An expert may be *locked* (a count, with or without a
    slot), *protected* (expected by a prediction, until its layer is routed) and *unused* (prefetched, not routed since).

    Rules. A slot is given up only by a resident expert that is not locked. A prefetch takes no slot of a protected expert; a demand
    read takes one if nothing else is left. Which of several it is, the policy says; it may refuse a prefetch that is less probable
    than what would go. A prefetched expert is protected from the moment it gets its slot.

    What only drafted tokens chose (``draft``) gets its slot without the policy taking it for used: that is said (``teach``) once
    the tokens are known to be right.

    Operations. ``route`` (``teach`` and ``look_up``), ``draft``, ``lock``, ``unlock``, ``expect``, ``protect``, ``begin``,
    ``finish`` and ``fail`` change the table, and the policy is called by them alone, and by ``can_begin``, which changes nothing.
    Callers make one call at a time (Residency holds its lock). ``is_resident``, ``slot_of``, ``sections_of`` and ``class_of`` may
    be called by any thread at any time; what they say of an expert that the caller has locked stays true, but that more sections
    may arrive. A call that breaks the contract raises KeyError or ValueError.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        class_of_slot: Sequence[int],
        class_of_expert: Mapping[ExpertId, int] | None = None,
        num_experts: int = 0,
    ) -> None:
        """``class_of_slot`` [num_slots]: the class of each slot, from 0. Experts that ``class_of_expert`` omits are of the last.

        ``num_experts``: of the model; 0 where that is not known.
        """
        self.counters = Counters()  # hits, in_flight, misses, upgrades, prefetched and prefetch_used are counted here
        self._policy = policy
        self._class_of_slot = list(class_of_slot)
        self._class_of_expert = class_of_expert or {}
        self._num_experts = num_experts
        self._last_class = max(class_of_slot)
        self._free: list[list[int]] = [[] for _ in range(self._last_class + 1)]  # by class, the next one to be taken last
        for slot in reversed(range(len(self._class_of_slot))):
            self._free[self._class_of_slot[slot]].append(slot)
        self._slots: dict[ExpertId, int] = {}  # of those resident or in flight
        self._in_flight: set[ExpertId] = set()
        self._short: dict[ExpertId, int] = {}  # sections held by those that hold some, but not all
        self._locks: dict[ExpertId, int] = {}
        self._protected: dict[int, set[ExpertId]] = {}  # by layer
        self._unused: set[ExpertId] = set()
        self._drafts: set[ExpertId] = set()  # missing, and asked for by drafted tokens alone
        self._unlocked = [self._candidates(number, spare=False) for number in range(self._last_class + 1)]  # by class
        self._unprotected = [self._candidates(number, spare=True) for number in range(self._last_class + 1)]

    @property
    def holds_all(self) -> bool:
        """Whether each expert of the model has a slot: none will have to give up its own, so the policy need not count uses."""
        return 0 < self._num_experts <= len(self._slots)

    # --- what changes the table ---

    def route(
        self,
        experts: Sequence[ExpertId],
        counts: Sequence[int] | None = None,
        num_tokens: int = 1,
        sections: Mapping[ExpertId, int] | None = None,
    ) -> dict[ExpertId, Lookup]:
        """A layer's router chose ``experts``: what each lookup finds, in their order; each is counted (honest counters).

        The experts are distinct and of one layer, chosen for ``counts`` of ``num_tokens`` tokens (None: for all of them). A
        resident expert that holds fewer ``sections`` than are wanted (default: all) is a miss, counted as an upgrade too. Nothing
        of this layer is protected afterwards. Of no experts there is no layer: nothing happens.
        """
        self.teach(experts, counts, num_tokens)
        return self.look_up(experts, sections)

    def teach(self, experts: Sequence[ExpertId], counts: Sequence[int] | None = None, num_tokens: int = 1) -> None:
        """The policy's part of ``route``."""
        if not experts:
            return
        if not self.holds_all:
            self._policy.routed(experts[0].layer, [expert.expert for expert in experts], counts, num_tokens)
        touched, slots, drafts = self._policy.touched, self._slots, self._drafts
        for expert in experts:
            drafts.discard(expert)
            if expert in slots:
                touched(expert)

    def draft(self, experts: Sequence[ExpertId]) -> None:
        """Those of ``experts`` that are missing are asked for by drafted tokens, until ``teach`` names them."""
        self._drafts.difference_update(experts)
        self._drafts.update(expert for expert in experts if expert not in self._slots)

    def look_up(self, experts: Sequence[ExpertId], sections: Mapping[ExpertId, int] | None = None) -> dict[ExpertId, Lookup]:
        """The rest of ``route``."""
        found: dict[ExpertId, Lookup] = {}
        if not experts:
            return found
        slots, in_flight, short, unused = self._slots, self._in_flight, self._short, self._unused
        counters, misses, arriving = self.counters, 0, 0
        for expert in experts:
            if expert not in slots:
                found[expert] = _MISS
                misses += 1
                continue
            if unused and expert in unused:
                unused.remove(expert)
                counters.prefetch_used += 1
            if in_flight and expert in in_flight:
                found[expert] = _IN_FLIGHT
                arriving += 1
            elif short and short.get(expert, WHOLE) < (sections.get(expert, WHOLE) if sections else WHOLE):
                found[expert] = _MISS
                misses += 1
                counters.upgrades += 1
            else:
                found[expert] = _HIT
        counters.hits += len(found) - misses - arriving
        counters.misses += misses
        counters.in_flight += arriving
        self._protected.pop(experts[0].layer, None)
        return found

    def lock(self, experts: Iterable[ExpertId]) -> None:
        """Each of ``experts`` is locked once more: with a slot, it keeps it."""
        locks = self._locks
        for expert in experts:
            locks[expert] = locks.get(expert, 0) + 1

    def unlock(self, experts: Sequence[ExpertId]) -> None:
        """Each of ``experts`` is locked once less. Raises KeyError at one that is not locked, after those before it."""
        locks = self._locks
        for expert in experts:
            count = locks.pop(expert) - 1
            if count:
                locks[expert] = count

    def unlock_all(self) -> None:
        """Nobody uses any expert any more."""
        self._locks.clear()

    def expect(self, experts: Sequence[ExpertId]) -> list[int]:
        """``experts`` are predicted: those resident are protected until their layer is routed. Returns the indices of the missing.

        Those in flight are left as they are: a prefetch is protected already, a demand read is about to be used.
        """
        slots, in_flight, protected = self._slots, self._in_flight, self._protected
        missing: list[int] = []
        layer, of_layer = -1, set[ExpertId]()
        for index, expert in enumerate(experts):
            if expert not in slots:
                missing.append(index)
            elif expert not in in_flight:
                if expert[0] != layer:
                    layer = expert[0]
                    of_layer = protected.setdefault(layer, set())
                of_layer.add(expert)
        return missing

    def protect(self, expert: ExpertId) -> None:
        """As ``expect`` of one that is resident, or in flight. Raises KeyError if it is missing."""
        if expert not in self._slots:
            raise KeyError(expert)
        self._protected.setdefault(expert.layer, set()).add(expert)

    def begin(self, expert: ExpertId, demand: bool = True, probability: float = 1.0) -> int | None:
        """A read of ``expert`` may begin: the slot it goes to, and ``expert`` is in flight. None, and no change, if it gets none.

        A missing expert takes a free slot or a victim's; a resident one that holds too few sections keeps its own. ``probability``
        of being used matters for prefetches only. Raises ValueError if there is nothing to read: in flight, or resident with all.
        """
        slot = self._slots.get(expert)
        if slot is not None:
            if expert in self._in_flight or expert not in self._short:  # with all its sections
                raise ValueError(f"{expert} is {'in flight' if expert in self._in_flight else 'resident'} already")
            self._in_flight.add(expert)
            return slot
        number = self._class_of_expert.get(expert, self._last_class) if self._class_of_expert else self._last_class
        free = self._free[number]
        if free:
            slot = free.pop()
        else:
            victim = self._victim(expert, number, demand, probability)
            if victim is None:
                return None
            slot = self._remove(victim)
        self._in_flight.add(expert)  # before it has a slot, for those who look without a lock
        self._slots[expert] = slot
        is_draft = expert in self._drafts
        self._drafts.discard(expert)
        self._policy.admitted(expert, prefetched=not demand or is_draft)
        if demand:
            if not is_draft:
                self._policy.touched(expert)
        else:
            self.counters.prefetched += 1
            self._unused.add(expert)
            self._protected.setdefault(expert.layer, set()).add(expert)
        return slot

    def finish(self, expert: ExpertId, sections: int = WHOLE) -> None:
        """The read of ``expert`` has ended: it is resident with its first ``sections``. Raises KeyError if it is not in flight."""
        self._in_flight.remove(expert)  # before the next lines, for those who look without a lock
        if sections != WHOLE:
            self._short[expert] = sections
        elif self._short:
            self._short.pop(expert, None)

    def fail(self, expert: ExpertId) -> None:
        """The read of ``expert`` has failed: it is missing and its slot free. Raises KeyError if it is not in flight.

        What its slot held before is lost too. Locks stay.
        """
        self._in_flight.remove(expert)
        slot = self._remove(expert)
        self._free[self._class_of_slot[slot]].append(slot)

    # --- what does not ---

    def can_begin(self, expert: ExpertId, demand: bool = True, probability: float = 1.0) -> bool:
        """Whether ``begin`` would give a missing or a short expert a slot now. Changes nothing."""
        number = self.class_of(expert)
        has = expert in self._slots or self._free[number]
        return bool(has) or self._victim(expert, number, demand, probability) is not None

    def is_resident(self, expert: ExpertId) -> bool:
        """Whether ``expert`` has a slot and nothing is being read into it."""
        return expert in self._slots and expert not in self._in_flight

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        """Which of ``experts`` are neither resident nor in flight."""
        slots = self._slots
        return [expert not in slots for expert in experts]

    def is_in_flight(self, expert: ExpertId) -> bool:
        """Whether ``expert`` has a slot and its read has not ended."""
        return expert in self._in_flight

    def is_locked(self, expert: ExpertId) -> bool:
        """Whether somebody has locked ``expert``."""
        return expert in self._locks

    def is_protected(self, expert: ExpertId) -> bool:
        """Whether ``expert`` was expected and its layer has not been routed since."""
        return expert in self._protected.get(expert.layer, ())

    def slot_of(self, expert: ExpertId) -> int:
        """The slot of an expert that is resident or in flight. Raises KeyError if it is missing."""
        return self._slots[expert]

    def sections_of(self, expert: ExpertId) -> int:
        """How many sections of ``expert``'s blob its slot holds: 0 if it is missing, WHOLE if all; not what a read is bringing."""
        held = self._short.get(expert)
        if held is None:
            held = 0 if expert in self._in_flight or expert not in self._slots else WHOLE
        return held

    def class_of(self, expert: ExpertId) -> int:
        """The class of slots that ``expert`` takes."""
        return self._class_of_expert.get(expert, self._last_class)

    @property
    def num_in_flight(self) -> int:
        """How many experts are in flight."""
        return len(self._in_flight)

    def resident(self) -> list[ExpertId]:
        """The experts that are resident."""
        in_flight = self._in_flight
        return [expert for expert in self._slots if expert not in in_flight]

    def slots(self) -> dict[ExpertId, int]:
        """The slot of every expert that is resident or in flight; a copy."""
        return dict(self._slots)

    def check_integrity(self) -> None:
        """Raise RuntimeError, with what is wrong, unless every slot is in one place and all books agree. O(slots)."""
        slots, class_of_slot = self._slots, self._class_of_slot
        places = [*slots.values(), *(slot for free in self._free for slot in free)]
        protected = [(layer, expert) for layer, experts in self._protected.items() for expert in experts]
        books = {
            "every slot is in one place": len(places) == len(class_of_slot) and set(places) == set(range(len(places))),
            "free slots are of their class": all(class_of_slot[s] == n for n, free in enumerate(self._free) for s in free),
            "an expert's slot is of its class": all(class_of_slot[slot] == self.class_of(e) for e, slot in slots.items()),
            "experts in flight have slots": self._in_flight <= slots.keys(),
            "experts with few sections have slots": self._short.keys() <= slots.keys(),
            "sections are more than none and fewer than all": all(0 < held < WHOLE for held in self._short.values()),
            "protected experts have slots": all(expert in slots and expert.layer == layer for layer, expert in protected),
            "unused experts have slots": self._unused <= slots.keys(),
            "drafted tokens' experts have none": not self._drafts & slots.keys(),
            "locks are counted": all(count > 0 for count in self._locks.values()),
        }
        broken = [name for name, holds in books.items() if not holds]
        if broken:
            raise RuntimeError(f"slot table: not so: {'; '.join(broken)}")

    def _candidates(self, number: int, spare: bool) -> Callable[[ExpertId], bool]:
        """Which experts may give up a slot of class ``number``; those that are protected not, if they are to be spared."""
        slots, class_of_slot, in_flight = self._slots, self._class_of_slot, self._in_flight
        locks, protected, only_class = self._locks, self._protected, self._last_class == 0

        def unlocked(expert: ExpertId) -> bool:
            return expert not in locks and expert not in in_flight and (only_class or class_of_slot[slots[expert]] == number)

        def unprotected(expert: ExpertId) -> bool:
            return (
                expert not in locks
                and expert not in in_flight
                and (only_class or class_of_slot[slots[expert]] == number)
                and expert not in protected.get(expert[0], ())
            )

        return unprotected if spare else unlocked

    def _victim(self, incoming: ExpertId, number: int, demand: bool, probability: float) -> ExpertId | None:
        """The expert that gives ``incoming`` its slot, one of class ``number``."""
        victim = self._policy.victim(incoming, self._unprotected[number], 1.0 if demand else probability)
        if victim is None and demand:
            victim = self._policy.victim(incoming, self._unlocked[number])
        return victim

    def _remove(self, expert: ExpertId) -> int:
        """Take the slot of ``expert`` away."""
        self._policy.removed(expert)
        slot = self._slots.pop(expert)
        if self._short:
            self._short.pop(expert, None)
        if self._unused:
            self._unused.discard(expert)
        protected = self._protected.get(expert.layer)
        if protected is not None:
            protected.discard(expert)
        return slot
