"""ExpertSources for tests: one in memory, and one around any other that is slow, gated, failing, tearing or short-reading."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fate_moe.core import SLOT_ALIGNMENT, ExpertId, ExpertSource
from fate_moe.errors import CorruptExpertError, StoreError

__all__ = ["MemorySource", "Read", "SourceDouble", "marked_blobs"]


class Read(NamedTuple):
    """What a source was asked for: the sections of ``expert`` from ``first`` up to but without ``last`` (None: to the end)."""

    expert: ExpertId
    first: int
    last: int | None


def marked_blobs(experts: Iterable[ExpertId], num_bytes: int = SLOT_ALIGNMENT) -> dict[ExpertId, bytes]:
    """A blob for each of ``experts`` that repeats its layer, its number and the block of 4096 bytes; no byte is 0."""
    blocks = range(num_bytes // SLOT_ALIGNMENT)
    return {e: b"".join(bytes([e.layer + 1, e.expert + 1, n + 1, 0xA5]) * (SLOT_ALIGNMENT // 4) for n in blocks) for e in experts}


class MemorySource:
    """Blobs from memory. ``ends``: where each section ends, ascending; the last one ends the blob, whatever ``ends`` says of it."""

    def __init__(self, blobs: Mapping[ExpertId, bytes], ends: Sequence[int] = (SLOT_ALIGNMENT,)) -> None:
        self.blobs = blobs
        self._ends = ends
        self.closed = False

    def read(self, expert: ExpertId, slot: memoryview, first: int = 0, last: int | None = None) -> int:
        """As core.ExpertSource. Copies no byte beyond the sections asked for; says the bytes that it copied."""
        assert not self.closed, "read after close"
        blob = self.blobs[expert]
        start, stop = self.span(expert, first, last)
        slot[start:stop] = blob[start:stop]
        return stop - start

    def span(self, expert: ExpertId, first: int, last: int | None) -> tuple[int, int]:
        """Where the sections from ``first`` up to but without ``last`` begin and end in the blob."""
        whole = last is None or last >= len(self._ends)
        return self._ends[first - 1] if first else 0, len(self.blobs[expert]) if whole else self._ends[(last or 1) - 1]

    def close(self) -> None:
        """As core.ExpertSource."""
        self.closed = True


class SourceDouble:
    """An ExpertSource around ``inner`` that misbehaves as told, and remembers what it was asked for.

    ``seconds``: each read takes so much longer. ``one_at_a_time``: as behind one link, a read begins when the one before has taken
    its ``seconds``. ``gate``: reads wait until it is set (it is). ``fails``, ``shorts``: so many next reads of an expert raise,
    CorruptExpertError with nothing of use in the slot, or StoreError with half of it. ``tears``: the slot holds something else
    until the read ends. Any number of threads may read, and change these, at once.
    """

    def __init__(self, inner: ExpertSource, seconds: float = 0.0, *, one_at_a_time: bool = False, tears: bool = False) -> None:
        self.inner, self.seconds, self.one_at_a_time, self.tears = inner, seconds, one_at_a_time, tears
        self.gate = threading.Event()
        self.gate.set()
        self.fails: dict[ExpertId, int] = {}
        self.shorts: dict[ExpertId, int] = {}
        self.reads: list[Read] = []  # in the order in which they began
        self.reading = self.most_reading = 0  # at once
        self.closed = False
        self._began = threading.Condition()
        self._link_free = 0.0

    def read(self, expert: ExpertId, slot: memoryview, first: int = 0, last: int | None = None) -> int:
        """As core.ExpertSource."""
        assert not self.closed, "read after close"
        with self._began:
            self.reads.append(Read(expert, first, last))
            self.reading += 1
            self.most_reading = max(self.most_reading, self.reading)
            begins = max(self._link_free, time.perf_counter()) if self.one_at_a_time else time.perf_counter()
            until = self._link_free = begins + self.seconds
            self._began.notify_all()
        try:
            assert self.gate.wait(10), "nobody opened the gate"
            fails, short = self._take(self.fails, expert), self._take(self.shorts, expert)
            if self.tears or fails:
                self._tear(expert, slot, first, last)
            if not fails:
                num_bytes = self._read_half(expert, slot, first, last) if short else self.inner.read(expert, slot, first, last)
            if self.seconds:
                time.sleep(max(0.0, until - time.perf_counter()))
            if fails:
                raise CorruptExpertError(f"layer {expert.layer} expert {expert.expert} differs from its checksum")
            if short:
                raise StoreError(f"layer {expert.layer} expert {expert.expert} ends early")
            return num_bytes
        finally:
            with self._began:
                self.reading -= 1

    def has_begun(self, expert: ExpertId, times: int = 1) -> bool:
        """Wait until ``expert`` has been asked for so many times; False if that takes more than five seconds."""
        with self._began:
            return self._began.wait_for(lambda: self.experts.count(expert) >= times, 5)

    @property
    def experts(self) -> list[ExpertId]:
        """Of all reads, in the order in which they began."""
        return [read.expert for read in self.reads]

    def close(self) -> None:
        """As core.ExpertSource."""
        self.closed = True
        self.inner.close()

    def _take(self, times: dict[ExpertId, int], expert: ExpertId) -> bool:
        with self._began:
            left = times.get(expert, 0)
            if left:
                times[expert] = left - 1
            return left > 0

    def _tear(self, expert: ExpertId, slot: memoryview, first: int, last: int | None) -> None:
        """Complement what a read of these sections brings, for a moment."""
        now = np.frombuffer(slot, np.uint8)
        before = now.copy()
        self.inner.read(expert, slot, first, last)
        now[now != before] ^= 0xFF
        time.sleep(0)

    def _read_half(self, expert: ExpertId, slot: memoryview, first: int, last: int | None) -> int:
        """Read, and put back what was in the second half."""
        half = len(slot) // 2
        before = bytes(slot[half:])
        num_bytes = self.inner.read(expert, slot, first, last)
        slot[half:] = before
        return num_bytes // 2
