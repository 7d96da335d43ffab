"""Prefixes on the disk: what is still to be written, and reading it back. block_files.py has the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fate_moe.schedule.block_files import BlockFiles
from fate_moe.schedule.prefixes import Prefixes

__all__ = ["DiskPrefixes"]

_USED_AT_ONCE = 256  # blocks that are there already, of which only the time is written: some milliseconds
_SHARE = 50  # beside requests at most one part in so many of the time is for writing
_BUSY_SECONDS = 0.05  # between two looks at whether another process has ended its writing


@dataclass
class _Kind:
    """Blocks, or checkpoints of states: where they are in memory by name (None: gone), and the bytes there."""

    files: BlockFiles
    place_of: Callable[[bytes], int | None]
    memory: Callable[[int], Sequence[memoryview]]
    waiting: dict[bytes, int] = field(default_factory=dict)  # to be written, or noted as used, and when they were


class DiskPrefixes:
    """Writes what ``prefixes`` keeps to ``files``, in the thread that runs the model while it has nothing else to do: a kept block
    does not change meanwhile. ``memory`` gives the bytes of a block, by its id."""

    def __init__(self, files: BlockFiles, prefixes: Prefixes, memory: Callable[[int], Sequence[memoryview]]) -> None:
        self.files = files
        self._prefixes = prefixes
        self._blocks = _Kind(files, prefixes.block_of, memory)
        self._states: _Kind | None = None
        self._next = self._next_beside = 0.0  # when it may be tried again, and beside requests

    def keep_states(self, files: BlockFiles, memory: Callable[[int], Sequence[memoryview]]) -> None:
        """Checkpoints of states go to ``files``; ``memory`` gives the bytes of one, by its entry."""
        assert self._prefixes.states is not None
        self._states = _Kind(files, self._prefixes.states.entry_of, memory)

    @property
    def has_work(self) -> bool:
        return any(kind.waiting for kind in self._kinds)

    @property
    def seconds_to_wait(self) -> float:
        """Until ``save`` may be called again."""
        return max(0.0, self._next - time.monotonic())

    @property
    def traffic(self) -> tuple[int, int, int]:
        """Bytes that all models have on the disk, when this process last wrote there, and that it read and wrote."""
        files = [kind.files for kind in self._kinds]
        last = max(files, key=lambda of: of.last_written)
        return last.num_bytes, sum(of.read_bytes for of in files), sum(of.written_bytes for of in files)

    def note(self, names: Sequence[bytes]) -> None:
        """``names``, the blocks of one text from its begin, were used."""
        if not self.files.is_writing:
            return
        now = time.time_ns()
        used = {name: now - 1000 * depth for depth, name in enumerate(names)}  # of one text, the end goes first
        self._blocks.waiting |= used
        if self._states is not None and self._prefixes.states is not None:
            self._states.waiting |= {name: used[name] for name in self._prefixes.states.to_note(names)}

    def paths_of(self, names: Sequence[bytes]) -> list[str]:
        """Of the files that blocks called ``names`` have or will have, and of their checkpoints."""
        paths = [self.files.path_of(name) for name in names]
        if (states := self._states) is not None:
            paths += [states.files.path_of(name) for name in names if name in states.waiting or states.files.has(name)]
        return paths

    def missing(self, names: Sequence[bytes], begun: int) -> list[bytes]:
        """Blocks that the disk may have, of the text of ``names``, whose first ``begun`` blocks are there: up to where the text may
        begin."""
        if (states := self._states) is None:
            return list(names[begun:])
        behind = next((count for count, name in enumerate(names[begun:], begun) if not self.files.has(name)), len(names))
        while behind > begun and not states.files.has(names[behind - 1]):
            behind -= 1
        return list(names[begun:behind])

    def load(self, name: bytes, block: int) -> bool:
        """Fill ``block``, which nobody else has, with what is on the disk as ``name``; whether it is there, whole."""
        return self.files.read(name, self._blocks.memory(block))

    def load_state(self, name: bytes, entry: int) -> bool:
        """As ``load``, a checkpoint into a sequence's ``entry``."""
        assert self._states is not None
        self._states.files.use(name, time.time_ns())
        return self._states.files.read(name, self._states.memory(entry))

    def save(self) -> None:
        """Write one block or checkpoint that waits. What is gone from memory is not written."""
        for kind in self._kinds:
            for _ in range(_USED_AT_ONCE):
                if not all(other.files.is_writing for other in self._kinds):  # one of them has said why
                    for other in self._kinds:
                        other.files.is_writing = False
                        other.waiting.clear()
                    return
                if (name := next(iter(kind.waiting), None)) is None:
                    break
                place, used = kind.place_of(name), kind.waiting[name]
                if not kind.files.use(name, used) and place is not None:
                    if kind.files.write(name, used, kind.memory(place)):
                        kind.waiting.pop(name, None)
                    else:
                        self._next = time.monotonic() + _BUSY_SECONDS
                    return
                del kind.waiting[name]
            else:
                return

    def save_beside(self) -> None:
        """As ``save``, between two steps of requests that run: rarely."""
        began = time.monotonic()
        if self.has_work and began >= max(self._next, self._next_beside):
            self.save()
            self._next_beside = (ended := time.monotonic()) + _SHARE * (ended - began)

    def save_all(self, seconds: float) -> None:
        """Write what waits, for ``seconds`` at most."""
        until = time.monotonic() + seconds
        while self.has_work and time.monotonic() < until:
            self.save()
            time.sleep(self.seconds_to_wait if self.has_work else 0.0)

    @property
    def _kinds(self) -> list[_Kind]:
        return [self._blocks] if self._states is None else [self._blocks, self._states]
