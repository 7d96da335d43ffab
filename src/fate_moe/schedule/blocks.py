"""Which blocks of the KV cache hold which sequence: rules alone, no tensors.

A block has room for ``KV_BLOCK`` positions in every layer. A sequence is a list of blocks, the same in all layers. Several
sequences may share a block; none of them writes to it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fate_moe.core import KV_BLOCK
from fate_moe.errors import FateError

__all__ = ["Blocks", "Copy", "OutOfBlocksError", "blocks_for"]

Copy = tuple[int, int]  # from a block to a block


class OutOfBlocksError(FateError):
    """Fewer blocks are free than a sequence needs."""


def blocks_for(tokens: int) -> int:
    """How many blocks hold ``tokens`` positions."""
    return -(-tokens // KV_BLOCK)


@dataclass
class _Table:
    length: int = 0  # positions that are filled
    blocks: list[int] = field(default_factory=list)


class Blocks:
    """``num_blocks`` blocks and the sequences in them. Not for several threads at once.

    A block is free, or has as many references as there are sequences with it, and one more if it is kept. The first blocks of a
    sequence hold its ``length`` positions; more may be reserved behind them. A call that raises OutOfBlocksError changes nothing.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # the one that was given back last is taken first: it is in the caches
        self._references = [0] * num_blocks
        self._kept: set[int] = set()
        self._tables: dict[int, _Table] = {}
        self._next = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.num_blocks - len(self._free)

    def new(self) -> int:
        """An empty sequence; its name is never used again."""
        self._next += 1
        self._tables[self._next] = _Table()
        return self._next

    def fork(self, sequence: int) -> int:
        """A sequence with the same positions, in the same blocks until one of both is continued."""
        table, made = self._tables[sequence], self.new()
        shared = table.blocks[: blocks_for(table.length)]
        self._tables[made] = _Table(table.length, shared)
        for block in shared:
            self._references[block] += 1
        return made

    def keep(self, block: int) -> None:
        """``block``, which a sequence has, stays when all of them are gone, until ``forget``."""
        if block in self._kept or not self._references[block]:
            raise ValueError(f"block {block} is {'kept already' if block in self._kept else 'free'}")
        self._kept.add(block)
        self._references[block] += 1

    def forget(self, block: int) -> None:
        """``block`` is kept no longer."""
        self._kept.remove(block)
        self._release(block)

    def begin(self, kept: Sequence[int]) -> int:
        """A sequence whose first positions are those of ``kept`` blocks."""
        if not self._kept.issuperset(kept):
            raise ValueError("a sequence begins with blocks that are kept")
        made = self.new()
        self._tables[made] = _Table(len(kept) * KV_BLOCK, list(kept))
        for block in kept:
            self._references[block] += 1
        return made

    def drop(self, sequence: int) -> None:
        """The sequence is gone; its blocks are free unless others have them."""
        for block in self._tables.pop(sequence).blocks:
            self._release(block)

    def length(self, sequence: int) -> int:
        return self._tables[sequence].length

    def table(self, sequence: int) -> tuple[int, ...]:
        """Its blocks: position p is in block p // KV_BLOCK of these."""
        return tuple(self._tables[sequence].blocks)

    def references(self, block: int) -> int:
        """How many sequences have ``block``."""
        return self._references[block]

    def needed(self, sequence: int, count: int) -> int:
        """How many free blocks ``append`` of ``count`` positions would take."""
        table = self._tables[sequence]
        return max(0, blocks_for(table.length + count) - len(table.blocks)) + self._is_shared(table)

    def reserve(self, sequence: int, tokens: int) -> None:
        """Take blocks now for ``tokens`` positions in all. Raises OutOfBlocksError."""
        table = self._tables[sequence]
        missing = blocks_for(tokens) - len(table.blocks)
        self._check(missing)
        table.blocks += [self._take() for _ in range(missing)]

    def append(self, sequence: int, count: int) -> list[Copy]:
        """``count`` (at least 1) more positions, all in blocks that no other sequence has. Raises OutOfBlocksError.

        Returns what has to be copied before they are written.
        """
        table = self._tables[sequence]
        self._check(self.needed(sequence, count))
        copies = []
        if self._is_shared(table):
            place = table.length // KV_BLOCK
            copies.append((table.blocks[place], self._take()))
            self._release(table.blocks[place])
            table.blocks[place] = copies[0][1]
        table.length += count
        self.reserve(sequence, table.length)
        return copies

    def append_all(self, counts: Sequence[tuple[int, int]]) -> list[Copy]:
        """``append`` for (sequence, count) of several sequences. Raises OutOfBlocksError, and none has changed."""
        self._check(sum(self.needed(sequence, count) for sequence, count in counts))
        return [copy for sequence, count in counts for copy in self.append(sequence, count)]

    def cut(self, sequence: int, length: int) -> None:
        """Only the first ``length`` positions stay; blocks behind them are given back."""
        table = self._tables[sequence]
        table.length = min(table.length, length)
        kept = blocks_for(table.length)
        for block in table.blocks[kept:]:
            self._release(block)
        del table.blocks[kept:]

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every block is free, or referenced as often as it is in lists."""
        held = [int(block in self._kept) for block in range(self.num_blocks)]
        for table in self._tables.values():
            if len(set(table.blocks)) < len(table.blocks) or len(table.blocks) < blocks_for(table.length):
                raise RuntimeError(f"a sequence of {table.length} positions has the blocks {table.blocks}")
            for block in table.blocks:
                held[block] += 1
        if held != self._references or sorted(self._free) != [block for block, count in enumerate(held) if not count]:
            raise RuntimeError("the blocks' references are not those of the sequences")

    def _is_shared(self, table: _Table) -> bool:
        """Whether the next position is in a block that others have too. It is filled in part: empty ones are not shared."""
        return table.length % KV_BLOCK > 0 and self._references[table.blocks[table.length // KV_BLOCK]] > 1

    def _check(self, wanted: int) -> None:
        if wanted > len(self._free):
            raise OutOfBlocksError(f"{wanted} blocks of the KV cache are needed, and {len(self._free)} are free")

    def _take(self) -> int:
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if not self._references[block]:
            self._free.append(block)
