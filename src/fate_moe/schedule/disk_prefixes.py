"""Prefixes on the disk: which blocks are still to be written, and reading them back. block_files.py has the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fate_moe.schedule.block_files import BlockFiles
from fate_moe.schedule.prefixes import Prefixes

__all__ = ["DiskPrefixes"]

_USED_AT_ONCE = 256  # blocks that are there already, of which only the time is written: some milliseconds
_SHARE = 50  # beside requests at most one part in so many of the time is for writing
_BUSY_SECONDS = 0.05  # between two looks at whether another process has ended its writing


class DiskPrefixes:
    """Writes what ``prefixes`` keeps to ``files``, in the thread that runs the model while it has nothing else to do: a kept block
    does not change meanwhile. ``memory`` gives the bytes of a block, by its id."""

    def __init__(self, files: BlockFiles, prefixes: Prefixes, memory: Callable[[int], Sequence[memoryview]]) -> None:
        self.files = files
        self._prefixes, self._memory = prefixes, memory
        self._waiting: dict[bytes, int] = {}  # blocks to be written, or noted as used, and when they were
        self._next = self._next_beside = 0.0  # when it may be tried again, and beside requests

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def seconds_to_wait(self) -> float:
        """Until ``save`` may be called again."""
        return max(0.0, self._next - time.monotonic())

    def note(self, names: Sequence[bytes]) -> None:
        """``names``, the blocks of one text from its begin, were used."""
        if self.files.is_writing:
            now = time.time_ns()
            for depth, name in enumerate(names):
                self._waiting[name] = now - 1000 * depth  # of one text, the end goes first

    def load(self, name: bytes, block: int) -> bool:
        """Fill ``block``, which nobody else has, with what is on the disk as ``name``; whether it is there, whole."""
        return self.files.read(name, self._memory(block))

    def save(self) -> None:
        """Write one block that waits. Blocks that are gone from memory are not written."""
        for _ in range(_USED_AT_ONCE):
            if not self._waiting or not self.files.is_writing:
                self._waiting.clear()
                return
            name = next(iter(self._waiting))
            block, used = self._prefixes.block_of(name), self._waiting[name]
            if not self.files.use(name, used) and block is not None:
                if self.files.write(name, used, self._memory(block)):
                    del self._waiting[name]
                else:
                    self._next = time.monotonic() + _BUSY_SECONDS
                return
            del self._waiting[name]

    def save_beside(self) -> None:
        """As ``save``, between two steps of requests that run: rarely."""
        began = time.monotonic()
        if self._waiting and began >= max(self._next, self._next_beside):
            self.save()
            self._next_beside = (ended := time.monotonic()) + _SHARE * (ended - began)

    def save_all(self, seconds: float) -> None:
        """Write what waits, for ``seconds`` at most."""
        until = time.monotonic() + seconds
        while self._waiting and time.monotonic() < until:
            self.save()
            time.sleep(self.seconds_to_wait if self._waiting else 0.0)
