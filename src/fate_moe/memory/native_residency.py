"""Experts in memory, by the extension (csrc/residency.h): the same face as ``portable``, which says what each call does.

The extension's object is also what a step in C++ asks for experts (csrc/expert_memory.h), without Python.
"""

from __future__ import annotations

import logging
import weakref
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fate_moe.core import Counters, EvictionPolicy, ExpertId, ExpertSource, Lookup
from fate_moe.errors import ConfigError
from fate_moe.kernels.extension import native
from fate_moe.memory.decayed import Decayed
from fate_moe.memory.policies import LRU
from fate_moe.memory.slots import SlotArena
from fate_moe.memory.table import WHOLE

__all__ = ["Lease", "LiveCounters", "Residency", "native_policy"]

_log = logging.getLogger(__name__)
_LOOKUPS = (Lookup.HIT, Lookup.IN_FLIGHT, Lookup.MISS)  # csrc/table.h: Found


def native_policy(policy: EvictionPolicy) -> Any:
    """The extension's twin of ``policy`` as it is new, with its statistics; of others, one that calls them."""
    if type(policy) is LRU:
        return native.Policy.lru()
    if type(policy) is Decayed and policy.statistics.native is not None:
        return native.Policy.decayed(policy.statistics.native)
    return native.Policy.python(policy, ExpertId)


def _live(name: str) -> Any:
    return property(lambda self: getattr(self.native, name), lambda self, value: setattr(self.native, name, value))


class LiveCounters(Counters):
    """Counters that the extension counts; their copies (``dataclasses.replace``) are plain ones."""

    def __new__(cls, native: Any = None, **values: Any) -> Any:
        return Counters(**values) if native is None else object.__new__(cls)

    def __init__(self, native: Any) -> None:
        self.native = native

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counters) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]


for _name in Counters.__dataclass_fields__:
    setattr(LiveCounters, _name, _live(_name))


class _Reader:
    """What the extension calls for a read by Python's means."""

    def __init__(self, source: ExpertSource, arena: SlotArena) -> None:
        self.source, self.arena = source, arena

    def __call__(self, layer: int, expert: int, slot: int, first: int, last: int | None) -> int:
        return self.source.read(ExpertId(layer, expert), self.arena.view(slot), first, last)


def _complain(layer: int, expert: int, error: str) -> None:
    if layer < 0:
        _log.error("a thread that reads experts ends: %s", error)
    else:
        _log.info("a prefetch of expert %d in MoE layer %d failed: %s", expert, layer, error)


class Residency:
    """``portable.Residency`` in C++."""

    def __init__(
        self,
        source: ExpertSource,
        arena: SlotArena,
        policy: EvictionPolicy,
        *,
        blob_bytes: Mapping[ExpertId, int] | None = None,
        io_threads: int = 4,
    ) -> None:
        self._reader = _Reader(source, arena)
        blobs = blob_bytes or {}
        memory = np.frombuffer(arena.buffer, np.uint8)
        start = memory.ctypes.data
        try:
            self.native = native.Residency.make(
                self._native_source(source),
                native_policy(policy),
                arena.class_of,
                [start + offset for offset in arena.offsets],
                memory,
                arena.class_bytes[-1],
                list(blobs),
                [arena.class_for(length) for length in blobs.values()],
                list(blobs.values()),
                io_threads,
            )
        except RuntimeError as error:
            raise ConfigError(
                f"the system does not start {io_threads} threads ({error}); lower --io-threads or raise the limit (ulimit -u)"
            ) from error
        self.native.set_complaint(_complain)
        # At exit the interpreter would end a thread that asks for its lock, in the midst of C++.
        weakref.finalize(self, self.native.close)
        self.counters: Counters = LiveCounters(self.native.counters)
        self._journal: list[tuple[ExpertId, bool, float, float]] | None = None
        self._missed: deque[ExpertId] | None = None

    def _native_source(self, source: ExpertSource) -> Any:
        return getattr(source, "native", None) or native.Source.python(self._reader)

    @property
    def _source(self) -> ExpertSource:
        return self._reader.source

    @_source.setter
    def _source(self, source: ExpertSource) -> None:
        self._reader.source = source
        self.native.set_source(self._native_source(source))

    @property
    def read_seconds(self) -> float:
        """See ``portable``."""
        return float(self.native.read_seconds)

    @property
    def journal(self) -> list[tuple[ExpertId, bool, float, float]] | None:
        """See ``portable``."""
        if self._journal is not None:
            self._journal += [(ExpertId(*expert), *others) for expert, *others in self.native.take_journal()]
        return self._journal

    @journal.setter
    def journal(self, journal: list[tuple[ExpertId, bool, float, float]] | None) -> None:
        self.native.write_journal(journal is not None)
        self._journal = journal

    @property
    def missed(self) -> deque[ExpertId] | None:
        """See ``portable``."""
        if (missed := self._missed) is not None:
            missed.extend(ExpertId(*expert) for expert in self.native.take_missed())
        return missed

    @missed.setter
    def missed(self, missed: deque[ExpertId] | None) -> None:
        self.native.write_missed(0 if missed is None else missed.maxlen or 1 << 20)
        self._missed = missed

    # --- leases ---

    def acquire(
        self,
        experts: Sequence[ExpertId],
        counts: Sequence[int] | None = None,
        num_tokens: int = 1,
        *,
        sections: Mapping[ExpertId, int] | None = None,
    ) -> Lease:
        wanted = [sections.get(expert, WHOLE) for expert in experts] if sections else None
        return Lease(self, experts, self.native.lease(experts, counts, num_tokens, wanted))

    def wait_for(self, lease: Any) -> list[tuple[int, int, int]]:
        """What is there for ``lease`` (number, slot, sections); all but the first call wait for at least one, and unlock what the
        call before gave."""
        given: list[tuple[int, int, int]] = self.native.next(lease)
        return given

    def unlock(self, lease: Any) -> None:
        """``lease`` is released."""
        self.native.release(lease)

    def forget_leases(self) -> None:
        self.native.forget_leases()

    # --- expectations and questions ---

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        return int(self.native.prefetch(expected, -1 if most is None else most, probabilities))

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        found: list[bool] = self.native.missing(experts)
        return found

    @property
    def holds_all(self) -> bool:
        return bool(self.native.holds_all())

    def cancel_prefetches(self) -> None:
        self.native.cancel_prefetches()

    def is_ready(self, expert: ExpertId) -> bool:
        return bool(self.native.is_ready(expert))

    def resident(self) -> list[ExpertId]:
        return [ExpertId(*expert) for expert in self.native.resident()]

    def slot_of(self, expert: ExpertId) -> int:
        return int(self.native.slot_of(expert))

    def held(self, expert: ExpertId) -> int:
        return int(self.native.held(expert))

    def wait_idle(self) -> None:
        self.native.wait_idle()

    def close(self) -> None:
        self.native.close()
        self._reader.source.close()

    def check_integrity(self) -> None:
        if broken := self.native.broken():
            raise RuntimeError(broken)

    # --- what a step in C++ uses; who wants to see what it routes, calls native.watch ---

    def count_uses(self, uses: array[int], first: Sequence[int]) -> None:
        """Count in ``uses[first[layer] + expert]`` what a step's blocks compute while nobody watches; ``first`` ends with the
        length of ``uses``."""
        self.native.count_uses(uses.buffer_info()[0], list(first), uses)


class Lease:
    """``portable.Lease`` in C++."""

    def __init__(self, residency: Residency, experts: Sequence[ExpertId], lease: Any) -> None:
        self._residency, self._experts, self.native = residency, experts, lease

    @property
    def lookups(self) -> dict[ExpertId, Lookup]:
        """What was found as the lease was made, in the order asked for."""
        return {expert: _LOOKUPS[code] for expert, code in zip(self._experts, self.native.found, strict=True)}

    def batches(self) -> Iterator[list[tuple[ExpertId, int]]]:
        residency, experts, first = self._residency, self._experts, True
        while (given := residency.wait_for(self.native)) or first:
            first = False
            if given:
                yield [(experts[index], slot) for index, slot, _ in given]

    def arrivals(self) -> Iterator[tuple[ExpertId, int]]:
        while (given := self._residency.native.next_one(self.native)) is not None:
            yield self._experts[given[0]], given[1]

    def release(self) -> None:
        self._residency.unlock(self.native)
