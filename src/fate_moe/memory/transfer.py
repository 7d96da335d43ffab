"""Reads that wait their turn, and the threads that make them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from fate_moe.core import ExpertId
from fate_moe.errors import ConfigError

__all__ = ["TransferQueue"]

T = TypeVar("T")


class TransferQueue:
    """Demand reads strictly before prefetches, first come first served within each.

    One of ``num_threads`` threads never prefetches, so that a demand read finds a free one at once. All methods but ``close`` are
    called with ``lock`` held. ``begin(expert, demand)`` is called with it too, when a thread is free: it gives the read to make
    (called without the lock) or None while there is no slot for it; ``slot_freed`` then makes the queue ask again. Meanwhile those
    in other lanes go on: ``lane(expert)`` is equal for those that wait for the same slots.
    """

    def __init__(
        self,
        lock: threading.Lock,
        begin: Callable[[ExpertId, bool], Callable[[], None] | None],
        lane: Callable[[ExpertId], int],
        num_threads: int,
    ) -> None:
        self._begin = begin
        self._lane = lane
        self._work = threading.Condition(lock)
        self._demands: OrderedDict[ExpertId, None] = OrderedDict()
        self._prefetches: OrderedDict[ExpertId, None] = OrderedDict()
        self._prefetching = 0
        self._most_prefetching = num_threads - 1
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"fate-read-{n}", daemon=True) for n in range(num_threads)]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self.close()
            raise ConfigError(
                f"the system does not start {num_threads} threads ({error}); lower --io-threads or raise the limit (ulimit -u)"
            ) from error

    def demand(self, expert: ExpertId) -> None:
        """Queue a demand read; a queued prefetch of the same expert becomes one."""
        self._prefetches.pop(expert, None)
        self._demands[expert] = None
        self._work.notify()

    def prefetch(self, expert: ExpertId) -> bool:
        """Queue a prefetch unless it is queued in some way already. False also where there is no thread to spare for prefetches."""
        if expert in self._prefetches or expert in self._demands or not self._most_prefetching:
            return False
        self._prefetches[expert] = None
        self._work.notify()
        return True

    def withdraw(self, expert: ExpertId) -> None:
        """Forget a queued demand read, if there is one."""
        self._demands.pop(expert, None)

    def cancel_prefetches(self, layer: int | None = None) -> None:
        """Forget the queued prefetches of ``layer``, or all."""
        for expert in [expert for expert in self._prefetches if layer is None or expert.layer == layer]:
            del self._prefetches[expert]

    def slot_freed(self) -> None:
        """A slot may have become free or evictable."""
        if self._demands or self._prefetches:
            self._work.notify()

    def demands(self) -> list[ExpertId]:
        """Queued demand reads, next one first."""
        return list(self._demands)

    def next_one(self, can: Callable[[ExpertId, bool], T | None]) -> tuple[ExpertId, bool, T] | None:
        """What comes next of all for which ``can(expert, demand)`` gives something, whether it is a demand, and what was given.

        Only the first of each lane is asked about, and no prefetch while a demand read is queued.
        """
        demand = bool(self._demands)
        lanes: tuple[int, ...] = ()
        for expert in self._demands or self._prefetches:
            if lanes and self._lane(expert) in lanes:
                continue
            if (given := can(expert, demand)) is not None:
                return expert, demand, given
            lanes = (*lanes, self._lane(expert))
        return None

    def close(self) -> None:
        """Forget what is queued, wait for the reads under way, end the threads."""
        with self._work:
            self._closed = True
            self._demands.clear()
            self._prefetches.clear()
            self._work.notify_all()
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join()

    def _run(self) -> None:
        with self._work:
            while not self._closed:
                taken = self._take()
                if taken is None:
                    self._work.wait()
                    continue
                read, demand = taken
                self._prefetching += not demand
                self.slot_freed()  # several may have become evictable at once: wake the next thread too
                self._work.release()
                try:
                    read()
                finally:
                    self._work.acquire()
                    self._prefetching -= not demand

    def _take(self) -> tuple[Callable[[], None], bool] | None:
        """The next read to make, out of the queue; None if nothing is queued or what comes next has no slot yet."""
        if not self._demands and (not self._prefetches or self._prefetching >= self._most_prefetching):
            return None
        found = self.next_one(self._begin)
        if found is None:
            return None
        expert, demand, read = found
        del (self._demands if demand else self._prefetches)[expert]
        return read, demand
