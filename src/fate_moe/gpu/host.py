"""The tier below VRAM: experts in pinned host memory, all of them, or as many as RAM holds with the disk behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from fate_moe.core import Counters, ExpertId, ExpertSource
from fate_moe.errors import ClosedModelError
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.streams import Lane
from fate_moe.io.progress import Advance
from fate_moe.kernels.triton_host import ask_kernel
from fate_moe.memory.residency import Lease, Residency

__all__ = ["DiskBelow", "HostTier", "View", "WholeHost", "read_all"]

# While questions come, the serving thread looks at the mailbox every _LOOK_SECONDS; _BUSY_SECONDS after the last one it starts to
# look every _IDLE_SECONDS only.
_LOOK_SECONDS, _IDLE_SECONDS, _BUSY_SECONDS = 20e-6, 1e-3, 0.2


class View(NamedTuple):
    """The start of a blob: its first ``sections`` sections, which are its first ``num_bytes`` bytes."""

    sections: int
    num_bytes: int


class HostTier(Protocol):
    """Where the device copies experts from. Experts are numbered ``layer * num_experts + expert``."""

    bytes: torch.Tensor  # uint8: what the fetch kernel reads
    most: int  # experts that one ``locate`` may name

    def locate(self, wanted: torch.Tensor) -> None:
        """Enqueue the replacement of the experts in ``wanted`` int32 [.., 2] by their places in ``bytes``, counted in blobs.

        ``wanted`` holds pairs (expert, slot); its last row's first entry is their number. The experts stay at those places until
        the next ``locate`` is carried out."""

    def copy(self, placed: Sequence[tuple[int, int]], pool: VramPool, lane: Lane, views: Mapping[int, View] | None = None) -> None:
        """Copy experts to slots, (expert, slot) pairs, on ``lane``; may wait for the disk. Of an expert in ``views`` that view is
        enough."""

    def check(self) -> None:
        """Raise the error of a read that the device asked for, if there was one: all numbers since the last check are then void,
        and so are all later ones. Waits for the device where such a read is possible. Raises ClosedModelError after ``close``."""

    def counters(self) -> Counters:
        """Traffic from disk."""

    def close(self) -> None: ...


class WholeHost:
    """Every expert at its own place in ``arena``; nothing ever moves."""

    def __init__(self, arena: PinnedArena) -> None:
        self._arena = arena
        self.bytes = arena.bytes
        self.most = arena.num_blobs
        self._closed = False

    def locate(self, wanted: torch.Tensor) -> None: ...

    def copy(self, placed: Sequence[tuple[int, int]], pool: VramPool, lane: Lane, views: Mapping[int, View] | None = None) -> None:
        with lane:
            for expert, slot in placed:
                end = views[expert].num_bytes if views and expert in views else None
                pool.slot(slot)[:end].copy_(self._arena.blob(expert)[:end], non_blocking=True)

    def check(self) -> None:
        if self._closed:
            raise ClosedModelError()

    def counters(self) -> Counters:
        return Counters()

    def close(self) -> None:
        self._closed = True
        self._arena.close()


class DiskBelow:
    """Fewer places than experts: the CPU tier's Residency reads them from disk and chooses victims.

    A CUDA graph cannot read a disk, so the device writes a question to a mailbox (``ask_kernel``) and a thread of the host answers
    it; only the lane of the demand copies waits meanwhile. The experts of an answer stay locked until the next question, which
    comes after their copies.
    """

    def __init__(self, residency: Residency, arena: PinnedArena, num_experts: int, device: torch.device) -> None:
        """``residency`` fills ``arena.slots``; a layer has ``num_experts``."""
        self.residency = residency
        self._arena, self._num_experts, self._device = arena, num_experts, device
        self.bytes = arena.bytes
        self.most = arena.num_blobs - 1  # one at least stays free for ``copy``
        self._rows = triton.next_power_of_2(num_experts)
        self._mail = PinnedArena(1, -(-16 * (self._rows + 1) // 4096) * 4096, device)
        words = self._mail.bytes.view(torch.int64)
        self._questions, self._answers = words[: self._rows + 1], words[self._rows + 1 : 2 * self._rows + 1]
        self._asked = torch.zeros(1, dtype=torch.int32, device=device)
        self._error: Exception | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="fate-host", daemon=True)
        self._thread.start()

    def locate(self, wanted: torch.Tensor) -> None:
        ask_kernel[(1,)](wanted, wanted[-1], self._asked, self._questions, self._answers, R=self._rows, num_warps=1)

    def copy(self, placed: Sequence[tuple[int, int]], pool: VramPool, lane: Lane, views: Mapping[int, View] | None = None) -> None:
        slots = {self._id(expert): slot for expert, slot in placed}
        short = {self._id(expert): view for expert, view in (views or {}).items()}
        sections = {expert: view.sections for expert, view in short.items()}
        by_layer: dict[int, list[ExpertId]] = {}
        for expert in slots:
            by_layer.setdefault(expert.layer, []).append(expert)
        for experts in by_layer.values():
            lease = self.residency.acquire(experts, sections=sections)
            try:
                for arrived in lease.batches():
                    with lane:
                        for expert, place in arrived:
                            end = short[expert].num_bytes if expert in short else None
                            pool.slot(slots[expert])[:end].copy_(self._arena.blob(place)[:end], non_blocking=True)
                    lane.synchronize()  # they are unlocked next
            finally:
                lease.release()

    def check(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        if self._error is not None:
            raise self._error

    def counters(self) -> Counters:
        return self.residency.counters

    def close(self) -> None:
        self._error = self._error or ClosedModelError()
        self._closed.set()
        self._thread.join()
        self.residency.close()
        self._mail.close()
        self._arena.close()

    def _id(self, expert: int) -> ExpertId:
        return ExpertId(*divmod(expert, self._num_experts))

    def _serve(self) -> None:
        questions, answers = self._questions.numpy(), self._answers.numpy()
        answered, last = 0, time.monotonic()
        lease: Lease | None = None
        while not self._closed.is_set():
            number, count = divmod(int(questions[0]), 1 << 32)
            if number == answered:
                time.sleep(_LOOK_SECONDS if time.monotonic() - last < _BUSY_SECONDS else _IDLE_SECONDS)
                continue
            if lease is not None:
                lease.release()
            lease = self._answer(number, count, questions, answers)
            answered, last = number, time.monotonic()
        if lease is not None:
            lease.release()

    def _answer(self, number: int, count: int, questions: NDArray[np.int64], answers: NDArray[np.int64]) -> Lease | None:
        """Answer question ``number``, each expert's place as soon as it has arrived; returns the lease that keeps them there."""
        for i in range(1, count + 1):
            while int(questions[i]) >> 32 != number:  # not visible yet
                time.sleep(0)
        where = {self._id(int(questions[i]) & 0xFFFFFFFF): i - 1 for i in range(1, count + 1)}
        tag, left = number << 32, dict(where)
        lease = None
        try:
            if self._error is not None:
                raise self._error
            lease = self.residency.acquire(list(where))
            for expert, slot in lease.arrivals():
                answers[left.pop(expert)] = tag | slot
        except Exception as error:
            self._error = error
            for i in left.values():
                answers[i] = tag  # any place, so that the device does not wait for ever; check() raises the error
        return lease


def read_all(source: ExpertSource, arena: PinnedArena, num_layers: int, num_experts: int, threads: int, advance: Advance) -> None:
    """Read every expert from ``source`` to its place in ``arena``. Raises the source's error (StoreError, CorruptExpertError)."""

    def read(number: int) -> int:
        return source.read(ExpertId(*divmod(number, num_experts)), arena.slots.view(number))

    with ThreadPoolExecutor(threads) as pool:
        for num_bytes in pool.map(read, range(num_layers * num_experts)):
            advance(num_bytes)
