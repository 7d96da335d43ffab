"""Who is where: which experts have slots, which are being read, and what lookups find."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from fate_moe.core import Counters, EvictionPolicy, ExpertId, ExpertSource, Lookup
from fate_moe.memory.lease import WHOLE, Lease
from fate_moe.memory.slots import SlotArena
from fate_moe.memory.transfer import TransferQueue

__all__ = ["Residency"]

_log = logging.getLogger(__name__)


class Residency:
    """Keeps experts in an arena's slots: demand reads for those asked for, prefetches for those expected, eviction by a policy.

    An expert is *resident*, *in flight* (it has a slot and its read has begun) or *missing*. A prefetch gets its slot only when a
    thread begins it, and never from an expert that is locked, in flight or *fresh*: expected, and its layer not acquired since. A
    demand read takes a fresh one if nothing else is left. A slot may hold only the first sections of its blob; a demand for more
    reads the rest into the same slot, and meanwhile the expert is in flight. Where slots are of several lengths, an expert takes
    one of the shortest that its blob fits into; while it waits for one, those that want other lengths go on. ``acquire`` and
    ``prefetch`` may be called from any thread.
    """

    def __init__(
        self,
        source: ExpertSource,
        arena: SlotArena,
        policy: EvictionPolicy,
        *,
        blob_bytes: Mapping[ExpertId, int] | None = None,
        io_threads: int = 4,
    ) -> None:
        """``blob_bytes`` of each expert; None: all are as long as the longest slots. ``io_threads``: concurrent reads, of which one
        is kept for demand reads (so with 1, nothing is prefetched)."""
        self.counters = Counters()
        # The link's time per whole blob (decayed mean), however many are under way at once; 0.0 before the first.
        self.read_seconds = 0.0
        # Where somebody wants to know: every read that ended, whether it was asked for, when it began and ended (perf_counter).
        self.journal: list[tuple[ExpertId, bool, float, float]] | None = None
        self._source = source
        self._arena = arena
        self._policy = policy
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)
        self._blob_bytes = blob_bytes or {}
        self._class = {expert: arena.class_for(length) for expert, length in self._blob_bytes.items()}
        self._longest = len(arena.class_bytes) - 1
        self._free: list[list[int]] = [[] for _ in arena.class_bytes]  # by class
        for slot in reversed(range(arena.num_slots)):
            self._free[arena.class_of[slot]].append(slot)
        self._slots: dict[ExpertId, int] = {}  # resident
        self._held: dict[ExpertId, int] = {}  # by resident and in flight: how many sections its slot holds
        self._reading: dict[ExpertId, int] = {}  # in flight, with the slot
        self._locks: dict[ExpertId, int] = {}  # by how many leases, resident or not
        self._waiting: dict[ExpertId, list[Lease]] = {}  # who wants to hear of an arrival
        self._fresh: dict[int, set[ExpertId]] = {}  # by layer
        self._unused: set[ExpertId] = set()  # prefetched, resident or in flight, not asked for yet
        self._probability: dict[ExpertId, float] = {}  # of queued prefetches
        self._link_since = 0.0  # when the reads under way began, or the last one of them ended
        self._closed = False
        self._queue = TransferQueue(self._lock, self._begin, self._lane, io_threads)

    # --- the inference thread ---

    def acquire(
        self,
        experts: Sequence[ExpertId],
        counts: Sequence[int] | None = None,
        num_tokens: int = 1,
        *,
        sections: Mapping[ExpertId, int] | None = None,
    ) -> Lease:
        """Lock ``experts``, start reading those that are missing, and say what each lookup found (law 5).

        The experts are distinct and of one layer, chosen for ``counts`` of ``num_tokens`` tokens (None: for all of them). What was
        expected of their layer and not asked for is no longer fresh; prefetches still queued for it are cancelled. ``sections``: of
        which blobs the first so many are enough. Raises RuntimeError after ``close``.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this model has been closed; load it again")
            if experts:
                self._policy.routed(experts[0].layer, [expert.expert for expert in experts], counts, num_tokens)
            wanted = sections or {}
            lease = Lease(self, {expert: self._look_up(expert, wanted.get(expert, WHOLE)) for expert in experts}, wanted)
            for expert, found in lease.lookups.items():
                self._locks[expert] = self._locks.get(expert, 0) + 1
                if found is not Lookup.HIT:
                    self._waiting.setdefault(expert, []).append(lease)
                if found is Lookup.MISS:
                    self._queue.demand(expert)
            if experts:
                self._fresh.pop(experts[0].layer, None)
                self._queue.cancel_prefetches(experts[0].layer)
            self._queue.slot_freed()
        return lease

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        """Queue reads of the first ``most`` of those ``expected`` that are missing, likeliest first; how many were queued.

        Those that are resident become fresh, so that no prefetch takes their slots. ``probabilities``, where they are known, let
        the policy keep what is likelier than what would come. Never waits for a read.
        """
        queued = 0
        with self._lock:
            for index, expert in enumerate(() if self._closed else expected):
                if expert in self._slots:
                    self._fresh.setdefault(expert.layer, set()).add(expert)
                elif expert not in self._reading and (most is None or queued < most) and self._queue.prefetch(expert):
                    queued += 1
                    if probabilities is not None:
                        self._probability[expert] = probabilities[index]
        return queued

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        """Which of ``experts`` are neither resident nor in flight."""
        with self._lock:
            return [expert not in self._slots and expert not in self._reading for expert in experts]

    def cancel_prefetches(self) -> None:
        """Forget the prefetches that have not begun."""
        with self._arrival:
            self._queue.cancel_prefetches()
            self._arrival.notify_all()

    def is_ready(self, expert: ExpertId) -> bool:
        """Whether ``expert`` is resident."""
        return expert in self._slots

    def slot_of(self, expert: ExpertId) -> int:
        """The slot of a resident expert; it stays valid while a lease holds the expert. Raises KeyError if it is not resident."""
        return self._slots[expert] if expert in self._slots else self._reading[expert]  # in flight: more of it is being read

    def held(self, expert: ExpertId) -> int:
        """How many sections of ``expert``'s blob its slot holds: 0 if it is missing, WHOLE if all of them."""
        return self._held.get(expert, 0)

    def wait_idle(self) -> None:
        """Wait until no read is under way and none can begin (a prefetch may stay queued for want of a slot)."""
        with self._arrival:
            while self._reading or self._can_begin():
                self._arrival.wait()

    def close(self) -> None:
        """Wait for the reads under way, stop the threads, close the source. Waiting leases raise RuntimeError."""
        with self._arrival:
            self._closed = True
        self._queue.close()
        with self._arrival:
            self._arrival.notify_all()
        self._source.close()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every slot is in exactly one place and all books agree. For tests and bug hunts."""
        with self._lock:
            free = [slot for of_class in self._free for slot in of_class]
            slots = sorted([*free, *self._slots.values(), *self._reading.values()])
            placed = {**self._slots, **self._reading}
            class_of = self._arena.class_of
            fresh = set().union(*self._fresh.values())
            books = {
                "every slot is in one place": slots == list(range(self._arena.num_slots)),
                "resident and in flight are disjoint": len(placed) == len(self._slots) + len(self._reading),
                "free slots are of their class": all(class_of[s] == n for n, of in enumerate(self._free) for s in of),
                "an expert's slot is of its class": all(class_of[slot] == self._class_of(e) for e, slot in placed.items()),
                "who has a slot holds a number of sections": placed.keys() == self._held.keys(),
                "fresh and unused experts have slots": fresh | self._unused <= placed.keys(),
                "locks are counted": all(count > 0 for count in self._locks.values()),
                "who waits has locked": set(self._waiting) <= set(self._locks),
                "nobody waits for a whole resident": all(self._held[e] < WHOLE for e in {*self._waiting} & {*self._slots}),
                "who waits is served": set(self._waiting) <= {*self._reading, *self._queue.demands()},
            }
        broken = [name for name, holds in books.items() if not holds]
        if broken:
            raise RuntimeError("residency: not so: " + "; ".join(broken))

    def _look_up(self, expert: ExpertId, wanted: int) -> Lookup:
        resident = expert in self._slots
        if not resident and expert not in self._reading:
            self.counters.misses += 1
            return Lookup.MISS
        self._policy.touched(expert)
        if expert in self._unused:
            self._unused.discard(expert)
            self.counters.prefetch_used += 1
        if resident and self._held[expert] < wanted:
            self.counters.misses += 1
            self.counters.upgrades += 1
            return Lookup.MISS
        if resident:
            self.counters.hits += 1
            return Lookup.HIT
        self.counters.in_flight += 1
        return Lookup.IN_FLIGHT

    def wait_for(self, lease: Lease) -> ExpertId:
        """The next expert to arrive for ``lease``; the wait is a stall."""
        with self._arrival:
            if lease.asked is not None:
                self.counters.overlap_seconds += time.perf_counter() - lease.asked
                lease.asked = None
            if not lease.arrived:
                began = time.perf_counter()
                while not lease.arrived:
                    if self._closed:
                        raise RuntimeError("the model was closed while an expert was awaited")
                    self._arrival.wait()
                self.counters.stall_seconds += time.perf_counter() - began
            expert, error = lease.arrived.popleft()
        if error is not None:
            raise error
        return expert

    def unlock(self, lease: Lease, experts: list[ExpertId]) -> None:
        """``lease`` is done with ``experts``; demand reads that nobody else waits for and that have not begun are withdrawn."""
        with self._lock:
            for expert in experts:
                del lease.held[expert]
                locks = self._locks.pop(expert) - 1
                if locks:
                    self._locks[expert] = locks
                waiting = self._waiting.get(expert) if self._waiting else None
                if waiting and lease in waiting:
                    waiting.remove(lease)
                    if not waiting:
                        del self._waiting[expert]
                        self._queue.withdraw(expert)
            self._queue.slot_freed()

    # --- the reading threads; the lock is held but for the read itself ---

    def _begin(self, expert: ExpertId, demand: bool) -> Callable[[], None] | None:
        """Give ``expert`` a slot; the read that fills it, or None if there is no slot for it now.

        No prefetch begins while somebody waits for a read: they would share the link (law 3).
        """
        if not demand and self._waiting:
            return None
        last = max((lease.wanted(expert) for lease in self._waiting.get(expert, ())), default=WHOLE) if demand else WHOLE
        if not self._reading:
            self._link_since = time.perf_counter()
        if expert in self._slots:  # it has the first sections
            slot = self._reading[expert] = self._slots.pop(expert)
            return lambda: self._read(expert, slot, demand, last)
        number = self._class_of(expert)
        free = self._free[number]
        if not free:
            victim = self._victim(expert, demand, number)
            if victim is None:
                return None
            self._policy.removed(victim)
            free.append(self._slots.pop(victim))
            del self._held[victim]
            self._forget_expected(victim)
        slot = self._reading[expert] = free.pop()
        self._held[expert] = 0
        self._policy.admitted(expert, prefetched=not demand)
        if demand:
            self._policy.touched(expert)
        else:
            self.counters.prefetched += 1
            self._unused.add(expert)
            self._fresh.setdefault(expert.layer, set()).add(expert)
        return lambda: self._read(expert, slot, demand, last)

    def _victim(self, incoming: ExpertId, demand: bool, number: int) -> ExpertId | None:
        """Who gives ``incoming`` its slot, one of class ``number``."""
        class_of = self._arena.class_of

        def evictable(expert: ExpertId) -> bool:
            slot = self._slots.get(expert)
            return slot is not None and class_of[slot] == number and expert not in self._locks

        def stale(expert: ExpertId) -> bool:
            return evictable(expert) and expert not in self._fresh.get(expert.layer, ())

        victim = self._policy.victim(incoming, stale, 1.0 if demand else self._probability.get(incoming, 1.0))
        if victim is None and demand:
            victim = self._policy.victim(incoming, evictable)
        return victim

    def _read(self, expert: ExpertId, slot: int, demand: bool, last: int) -> None:
        num_bytes, whole, began = 0, True, time.perf_counter()
        error: Exception | None = None
        try:
            if whole := last == WHOLE and not self._held[expert]:
                num_bytes = self._source.read(expert, self._arena.view(slot))
            else:
                end = None if last == WHOLE else last
                num_bytes = self._source.read(expert, self._arena.view(slot), self._held[expert], end)
        except Exception as failure:  # raised again in the thread that asked for it
            error = failure
        with self._arrival:
            seconds, self._link_since = time.perf_counter() - self._link_since, time.perf_counter()
            del self._reading[expert]
            if error is None:
                self._slots[expert] = slot
                self._held[expert] = last
                self.counters.bytes_read += num_bytes
                self.counters.link_seconds += seconds
                if self.journal is not None:
                    self.journal.append((expert, demand, began, time.perf_counter()))
                if not whole:
                    length = self._blob_bytes.get(expert, self._arena.class_bytes[-1])
                    seconds *= length / num_bytes  # what all of it would have taken
                self.read_seconds = seconds if not self.read_seconds else self.read_seconds + 0.1 * (seconds - self.read_seconds)
            else:
                self._policy.removed(expert)
                self._forget_expected(expert)
                del self._held[expert]
                self._free[self._class_of(expert)].append(slot)
            if error is not None and not demand and expert in self._waiting:
                self._queue.demand(expert)  # it was only a prefetch that failed: those who wait for it get one read of their own
            elif error is not None and not demand:
                _log.info("a prefetch of expert %d in MoE layer %d failed: %s", expert.expert, expert.layer, error)
            else:
                waiting = self._waiting.pop(expert, [])
                short = [lease for lease in waiting if error is None and lease.wanted(expert) > last]
                if short:  # one came after this read had begun and wants more sections than it brought
                    self._waiting[expert] = short
                    self._queue.demand(expert)
                for lease in waiting:
                    if lease not in short:
                        lease.arrived.append((expert, error))
            self._queue.slot_freed()
            self._arrival.notify_all()

    def _can_begin(self) -> bool:
        """Whether a thread is about to begin one of those that come next in the queue."""

        def finds_slot(expert: ExpertId, demand: bool) -> bool | None:
            if not demand and self._waiting:
                return None
            number = self._class_of(expert)
            has = expert in self._slots or self._free[number] or self._victim(expert, demand, number) is not None
            return True if has else None

        return self._queue.next_one(finds_slot) is not None

    def _class_of(self, expert: ExpertId) -> int:
        return self._class.get(expert, self._longest)

    def _lane(self, expert: ExpertId) -> int:
        """Who waits for the same slots as ``expert``: its class; one that has a slot already waits for none."""
        return -1 if expert in self._slots else self._class_of(expert)

    def _forget_expected(self, expert: ExpertId) -> None:
        self._unused.discard(expert)
        fresh = self._fresh.get(expert.layer)
        if fresh is not None:
            fresh.discard(expert)
