"""Which entries of a pool of states are whose: of sequences, and checkpoints of texts' beginnings. Rules alone, no tensors.

A layer with a state keeps that of a sequence's last token, so a text can be read from where it differs only at positions where the
state was written down. A checkpoint has the name of the block that ends there (schedule/prefixes.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fate_moe.schedule.blocks import OutOfBlocksError

__all__ = ["Mark", "States"]


@dataclass(frozen=True)
class Mark:
    """A checkpoint ``name`` is to be made once the sequence has ``position`` tokens. ``passing``: not where a text ends or parts
    from another."""

    position: int
    name: bytes
    passing: bool = False


class States:
    """``num_entries``, of which each sequence has one. The others may hold checkpoints, ``most_kept`` at most: those in passing go
    first, then what was made or used longest ago. Not for several threads at once."""

    def __init__(self, num_entries: int, most_kept: int | None = None) -> None:
        self.num_entries = num_entries
        self._most_kept = num_entries if most_kept is None else most_kept
        self._free = list(range(num_entries))[::-1]
        self._entries = dict[int, int]()  # by sequence
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # what goes first is first
        self._passing, self._noted = set[bytes](), set[bytes]()
        self._taken = 0  # entries for checkpoints that are not made yet

    def __len__(self) -> int:
        """How many checkpoints there are."""
        return len(self._kept)

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def enter(self, sequence: int) -> int:
        """An entry for ``sequence``; the least useful checkpoint goes if none is free. Raises OutOfBlocksError."""
        if not self._free and not self._drop_one():
            raise OutOfBlocksError(f"there is room for the states of {self.num_entries} sequences")
        self._entries[sequence] = self._free.pop()
        return self._entries[sequence]

    def entry(self, sequence: int) -> int:
        return self._entries[sequence]

    def leave(self, sequence: int) -> None:
        """``sequence`` is gone."""
        self._free.append(self._entries.pop(sequence))

    def use(self, name: bytes) -> int:
        """The entry of checkpoint ``name``, which a sequence begins from."""
        self._kept.move_to_end(name)
        self._noted.discard(name)
        self._passing.discard(name)
        return self._kept[name]

    def entry_of(self, name: bytes) -> int | None:
        """Of a checkpoint."""
        return self._kept.get(name)

    def take(self, marks: Sequence[Mark]) -> list[tuple[Mark, int]]:
        """Entries that checkpoints are about to be written to, of ``marks`` that are not there and find room; ``put`` follows."""
        found = list[tuple[Mark, int]]()
        for mark in marks:
            if mark.name not in self._kept and (entry := self._take(mark.passing)) is not None:
                found.append((mark, entry))
        return found

    def put(self, taken: Iterable[tuple[Mark, int]], written: bool) -> None:
        """What ``take`` gave holds its checkpoints now, or could not be written."""
        for mark, entry in taken:
            self._taken -= 1
            if not written or mark.name in self._kept:  # another sequence came here in the same step
                self._free.append(entry)
                continue
            self._kept[mark.name] = entry
            if mark.passing:
                self._passing.add(mark.name)
                self._kept.move_to_end(mark.name, last=False)

    def forget(self, name: bytes) -> None:
        """Checkpoint ``name`` is gone, if there is one."""
        if (entry := self._kept.pop(name, None)) is not None:
            self._free.append(entry)
            self._passing.discard(name)
            self._noted.discard(name)

    def to_note(self, names: Sequence[bytes]) -> list[bytes]:
        """Checkpoints among ``names`` that were made or begun from since the last call, none in passing."""
        found = [name for name in names if name in self._kept and name not in self._passing and name not in self._noted]
        self._noted.update(found)
        return found

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every entry is free, a sequence's or a checkpoint's."""
        held = [*self._free, *self._entries.values(), *self._kept.values()]
        if len(held) + self._taken != self.num_entries or len(set(held)) < len(held) or not self._passing <= self._kept.keys():
            raise RuntimeError("the entries of states are miscounted")

    def _take(self, passing: bool) -> int | None:
        """A free entry for a checkpoint, within what may be kept; one in passing takes no other's."""
        full = not self._free or len(self._kept) + self._taken >= self._most_kept
        if full and (passing or not self._drop_one()):
            return None
        self._taken += 1
        return self._free.pop()

    def _drop_one(self) -> bool:
        """The least useful checkpoint goes; whether there was one."""
        if not self._kept:
            return False
        self.forget(next(iter(self._kept)))
        return True
