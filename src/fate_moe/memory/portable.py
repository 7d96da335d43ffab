"""Experts in memory: a table of slots with the threads that fill them, and the leases that inference threads hold."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from fate_moe.core import EvictionPolicy, ExpertId, ExpertSource, Lookup
from fate_moe.errors import ClosedModelError
from fate_moe.memory.slots import SlotArena
from fate_moe.memory.table import WHOLE, SlotTable
from fate_moe.memory.transfer import TransferQueue

__all__ = ["Lease", "Residency"]

_log = logging.getLogger(__name__)
_HIT, _MISS = Lookup.HIT, Lookup.MISS


class Residency:
    """Keeps experts in an arena's slots: demand reads for those asked for, prefetches for those expected, eviction by a policy.

    Which expert gets which slot is the table's to say (memory.table.SlotTable). A slot may hold only the first sections of its
    blob; a demand for more reads the rest into the same slot, and meanwhile the expert is in flight. An expert takes one of the
    shortest slots that its blob fits into; while it waits for one, experts that want other lengths go on. ``acquire`` and
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
        is reserved for demand reads (so with 1, nothing is prefetched)."""
        # The link's time per whole blob (decayed mean), however many are read at once; 0.0 before the first.
        self.read_seconds = 0.0
        # If a list: every read that ended, whether it was a demand read, when it began and ended (perf_counter).
        self.journal: list[tuple[ExpertId, bool, float, float]] | None = None
        # If a deque: every lookup that missed, in order.
        self.missed: deque[ExpertId] | None = None
        self._source = source
        self._arena = arena
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)
        self._blob_bytes = blob_bytes or {}
        classes = {expert: arena.class_for(length) for expert, length in self._blob_bytes.items()}
        self._table = SlotTable(policy, arena.class_of, classes, len(classes))
        self.counters = self._table.counters
        self._waiting: dict[ExpertId, list[Lease]] = {}  # that wait for an arrival
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
        """Lock ``experts``, start reading those that are missing, and say what each lookup found (honest counters).

        The experts are distinct and of one layer, chosen for ``counts`` of ``num_tokens`` tokens (None: for all of them). Experts
        of their layer are no longer protected; prefetches still queued for it are cancelled. ``sections``: the blobs of which the
        first so many are enough. Raises ClosedModelError after ``close``.
        """
        with self._lock:
            if self._closed:
                raise ClosedModelError
            lease = Lease(self, self._table.route(experts, counts, num_tokens, sections), sections or {})
            self._table.lock(experts)
            for expert, found in lease.lookups.items():
                if found is not _HIT:
                    self._waiting.setdefault(expert, []).append(lease)
                    if found is _MISS:
                        self._queue.demand(expert)
                        if self.missed is not None:
                            self.missed.append(expert)
            if experts:
                self._queue.cancel_prefetches(experts[0].layer)
            self._queue.slot_freed()
        return lease

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        """Queue reads of the first ``most`` of those ``expected`` that are missing, likeliest first; how many were queued.

        Those that are resident become protected, so that no prefetch takes their slots. ``probabilities``, where they are known,
        let the policy refuse a prefetch that is less probable than what it would displace. Never waits for a read.
        """
        queued = 0
        with self._lock:
            for index in () if self._closed else self._table.expect(expected):
                if most is not None and queued >= most:
                    break
                if self._queue.prefetch(expected[index]):
                    queued += 1
                    if probabilities is not None:
                        self._probability[expected[index]] = probabilities[index]
        return queued

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        """Which of ``experts`` are neither resident nor in flight."""
        with self._lock:
            return self._table.missing(experts)

    @property
    def holds_all(self) -> bool:
        """Whether each expert has a slot."""
        with self._lock:
            return self._table.holds_all

    def cancel_prefetches(self) -> None:
        """Forget the prefetches that have not begun."""
        with self._arrival:
            self._queue.cancel_prefetches()
            self._arrival.notify_all()

    def is_ready(self, expert: ExpertId) -> bool:
        """Whether ``expert`` is resident."""
        return self._table.is_resident(expert)

    def resident(self) -> list[ExpertId]:
        """All experts that are resident now."""
        with self._lock:
            return self._table.resident()

    def slot_of(self, expert: ExpertId) -> int:
        """The slot of an expert that is resident or of which more is being read; it stays the same while a lease holds the expert.

        Raises KeyError if it has none.
        """
        return self._table.slot_of(expert)

    def held(self, expert: ExpertId) -> int:
        """How many sections of ``expert``'s blob its slot holds: 0 if it is missing, WHOLE if all of them."""
        return self._table.sections_of(expert)

    def wait_idle(self) -> None:
        """Wait until no read is under way and none can begin (a prefetch may stay queued for want of a slot)."""
        with self._arrival:
            while self._table.num_in_flight or self._can_begin():
                self._arrival.wait()

    def close(self) -> None:
        """Wait for the reads under way, stop the threads, close the source. Waiting leases raise ClosedModelError."""
        with self._arrival:
            self._closed = True
        self._queue.close()
        with self._arrival:
            self._arrival.notify_all()
        self._source.close()

    def check_integrity(self) -> None:
        """Raise RuntimeError, with what is wrong, unless the table's books and those of waiting leases agree.

        May be called at any time, from any thread, with leases held and reads under way; takes time linear in slots.
        """
        with self._lock:
            self._table.check_integrity()
            waiting, demands = self._waiting, set(self._queue.demands())
            books = {
                "leases wait for what they have locked": all(self._table.is_locked(expert) for expert in waiting),
                "no lease waits for what is resident with enough sections": not any(
                    self._table.is_resident(expert) and all(lease.wanted(expert) <= self.held(expert) for lease in leases)
                    for expert, leases in waiting.items()
                ),
                "what leases wait for is queued or in flight": all(
                    expert in demands or self._table.is_in_flight(expert) for expert in waiting
                ),
            }
        broken = [name for name, holds in books.items() if not holds]
        if broken:
            raise RuntimeError("residency: not so: " + "; ".join(broken))

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
                        raise ClosedModelError
                    self._arrival.wait()
                self.counters.stall_seconds += time.perf_counter() - began
            expert, error = lease.arrived.popleft()
        if error is not None:
            raise error
        return expert

    def unlock(self, lease: Lease, experts: list[ExpertId]) -> None:
        """``lease`` is done with ``experts``; demand reads that no other lease waits for and that have not begun are withdrawn."""
        with self._lock:
            self._table.unlock(experts)
            for expert in experts:
                del lease.held[expert]
                waiting = self._waiting.get(expert) if self._waiting else None
                if waiting and lease in waiting:
                    waiting.remove(lease)
                    if not waiting:
                        del self._waiting[expert]
                        self._queue.withdraw(expert)
            self._queue.slot_freed()

    def forget_leases(self) -> None:
        """A pass was cut short, wherever it was (Ctrl-C comes at any line): nothing is locked or awaited any more."""
        with self._arrival:
            self._table.unlock_all()
            self._waiting.clear()
            for expert in self._queue.demands():
                self._queue.withdraw(expert)
            self._queue.slot_freed()
            self._arrival.notify_all()

    # --- the reading threads; the lock is held but for the read itself ---

    def _begin(self, expert: ExpertId, demand: bool) -> Callable[[], None] | None:
        """Give ``expert`` a slot; the read that fills it, or None if there is no slot for it now.

        No prefetch begins while a lease waits for a read: they would share the link (never slower than not trying).
        """
        if not demand and self._waiting:
            return None
        first_in_flight = not self._table.num_in_flight
        slot = self._table.begin(expert, demand, self._probability.get(expert, 1.0))
        if slot is None:
            return None
        if first_in_flight:
            self._link_since = time.perf_counter()
        last = max((lease.wanted(expert) for lease in self._waiting.get(expert, ())), default=WHOLE) if demand else WHOLE
        return lambda: self._read(expert, slot, demand, last)

    def _read(self, expert: ExpertId, slot: int, demand: bool, last: int) -> None:
        num_bytes, whole, began = 0, True, time.perf_counter()
        error: Exception | None = None
        try:
            first = self.held(expert)
            whole = last == WHOLE and not first
            num_bytes = self._source.read(expert, self._arena.view(slot), first, None if last == WHOLE else last)
        except Exception as failure:  # raised again in the thread that waits for it
            error = failure
        with self._arrival:
            seconds, self._link_since = time.perf_counter() - self._link_since, time.perf_counter()
            if error is None:
                self._table.finish(expert, last)
                self.counters.bytes_read += num_bytes
                self.counters.link_seconds += seconds
                if self.journal is not None:
                    self.journal.append((expert, demand, began, time.perf_counter()))
                if not whole:
                    length = self._blob_bytes.get(expert, self._arena.class_bytes[-1])
                    seconds *= length / num_bytes  # what all of it would have taken
                self.read_seconds = seconds if not self.read_seconds else self.read_seconds + 0.1 * (seconds - self.read_seconds)
            else:
                self._table.fail(expert)
            if error is not None and not demand and expert in self._waiting:
                self._queue.demand(expert)  # only a prefetch failed: leases that wait for it get one read of their own
            elif error is not None and not demand:
                _log.info("a prefetch of expert %d in MoE layer %d failed: %s", expert.expert, expert.layer, error)
            else:
                waiting = self._waiting.pop(expert, [])
                short = [lease for lease in waiting if error is None and lease.wanted(expert) > last]
                if short:  # leases that came after this read had begun and want more sections than it brought
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
            return self._table.can_begin(expert, demand, self._probability.get(expert, 1.0)) or None

        return self._queue.next_one(finds_slot) is not None

    def _lane(self, expert: ExpertId) -> int:
        """Equal for experts that wait for the same slots: the class; one that has a slot already waits for none."""
        return -1 if self._table.is_resident(expert) else self._table.class_of(expert)


class Lease:
    """Experts that are locked for use; at most one unreleased lease per thread.

    Iterate ``batches`` or ``arrivals`` once, to the end or until ``release``. Both give ``(expert, slot)``: those that were
    resident first, in the order asked for, then the others as they arrive. Both raise the source's error (StoreError,
    CorruptExpertError) at an expert that cannot be read, and ClosedModelError if the residency is closed meanwhile; ``release``
    still has to be called.
    """

    def __init__(self, residency: Residency, lookups: dict[ExpertId, Lookup], wanted: Mapping[ExpertId, int]) -> None:
        """Made by ``Residency.acquire``. ``wanted``: the blobs of which the first so many sections are enough."""
        self.lookups = lookups
        self._wanted = wanted
        self._residency = residency
        self.arrived: deque[tuple[ExpertId, Exception | None]] = deque()
        self.held = dict.fromkeys(lookups)  # not unlocked yet
        self.asked: float | None = time.perf_counter()  # None once what was missing has been needed

    def wanted(self, expert: ExpertId) -> int:
        """How many sections of ``expert``'s blob are enough."""
        return self._wanted.get(expert, WHOLE)

    def batches(self) -> Iterator[list[tuple[ExpertId, int]]]:
        """Lists, all that were resident, then those that have arrived; each is unlocked when the next one is asked for.

        So more experts than there are slots can be leased.
        """
        residency = self._residency
        hits = self._hits()
        if hits:
            yield [(expert, residency.slot_of(expert)) for expert in hits]
            residency.unlock(self, [expert for expert in hits if expert in self.held])
        missing = len(self.lookups) - len(hits)
        while missing:
            arrived = [residency.wait_for(self)]
            while self.arrived:
                arrived.append(residency.wait_for(self))
            missing -= len(arrived)
            yield [(expert, residency.slot_of(expert)) for expert in arrived]
            residency.unlock(self, [expert for expert in arrived if expert in self.held])

    def arrivals(self) -> Iterator[tuple[ExpertId, int]]:
        """One by one, all of them locked until ``release``: there must be slots for all at once."""
        hits = self._hits()
        for expert in hits:
            yield expert, self._residency.slot_of(expert)
        for _ in range(len(self.lookups) - len(hits)):
            expert = self._residency.wait_for(self)
            yield expert, self._residency.slot_of(expert)

    def release(self) -> None:
        """Unlock what is left and withdraw the demand reads that have not begun. May be called again."""
        if self.held:
            self._residency.unlock(self, list(self.held))

    def _hits(self) -> list[ExpertId]:
        return [expert for expert, found in self.lookups.items() if found is _HIT]
