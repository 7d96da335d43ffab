"""Beginnings of texts whose keys and values are still there: which blocks hold which tokens. Rules alone, no tensors.

A full block of the KV cache depends on its tokens and on all before them, so it has a name: the digest of the name before it and
its own tokens. A new sequence begins with the blocks whose names its tokens give, as far as they are there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from fate_moe.core import KV_BLOCK
from fate_moe.schedule.blocks import Blocks
from fate_moe.schedule.states import States

__all__ = ["Prefixes"]


@dataclass
class _Kept:
    block: int
    before: bytes  # the name of the block before it
    depth: int
    used: int = 0  # when it was last part of a sequence, by count of sequences
    followers: int = 0  # kept blocks that come after it


class Prefixes:
    """Keeps full blocks of sequences that ended, in ``blocks``; the least useful ones go when room is wanted.

    What goes first is what was used longest ago, and of one text its end: a block is of no use without those before it. At most
    ``most`` blocks are kept; a text begins with a multiple of ``several`` of them. ``model`` says what else the keys and values
    depend on: model, precision, version of the arithmetic. ``states``: of a model with layers that keep a state; a text begins
    where one of its checkpoints is.
    """

    def __init__(
        self, blocks: Blocks, model: bytes = b"", most: int | None = None, states: States | None = None, several: int = 1
    ) -> None:
        self.hits = self.lookups = 0  # tokens that were found, and that were asked for
        self.states = states
        self._blocks, self._model, self._several = blocks, model, several
        self._most = blocks.num_blocks if most is None else most
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # what goes first is first
        self._clock = 0

    def __len__(self) -> int:
        """How many blocks are kept."""
        return len(self._kept)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The kept blocks that a text beginning with ``tokens`` may begin with; they are used now.

        At least one token is left to compute, whose logits are wanted.
        """
        self._clock += 1
        names = self.names(tokens)
        found = names[: self.matching(names) // self._several * self._several]
        while self.states is not None and found and found[-1] not in self.states:
            found.pop()
        self._use(found)
        return [self._kept[name].block for name in found]

    def matching(self, names: Sequence[bytes]) -> int:
        """How many blocks are kept of those called ``names``, of one text from its begin."""
        return next((count for count, name in enumerate(names) if name not in self._kept), len(names))

    def names(self, tokens: Sequence[int]) -> list[bytes]:
        """Of the blocks that a text beginning with ``tokens`` may begin with, which leave a token to compute."""
        return self._names(tokens, (len(tokens) - 1) // KV_BLOCK // self._several * self._several)

    def name_at(self, tokens: Sequence[int], position: int) -> bytes:
        """Of the block that ends at ``position``, a multiple of its length."""
        return self._names(tokens, position // KV_BLOCK)[-1]

    def use_state(self, tokens: Sequence[int], read: int) -> int | None:
        """The entry of the checkpoint behind the first ``read`` of ``tokens``, which a sequence begins from; None if it begins from
        none."""
        return self.states.use(self.name_at(tokens, read)) if self.states is not None and read else None

    def block_of(self, name: bytes) -> int | None:
        """The kept block of this ``name``."""
        kept = self._kept.get(name)
        return None if kept is None else kept.block

    def begin(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A sequence of ``blocks`` for a text that begins with ``tokens``, and how many of them it has already."""
        found = self.find(tokens)
        self.lookups += len(tokens)
        self.hits += len(found) * KV_BLOCK
        return self._blocks.begin(found), len(found) * KV_BLOCK

    def keep(self, sequence: int, tokens: Sequence[int]) -> list[bytes]:
        """``sequence``, whose positions hold ``tokens``, is about to be dropped: keep its full blocks. Returns their names."""
        self._clock += 1
        table, before, used = self._blocks.table(sequence), self._model, list[bytes]()
        names = self._names(tokens, min(self._blocks.length(sequence), len(tokens)) // KV_BLOCK)
        for depth, name in enumerate(names):
            kept = self._kept.get(name)
            if kept is None:
                if len(self._kept) >= self._most and not self._drop_one(spare=self._clock):
                    break
                self._blocks.keep(table[depth])
                kept = self._kept[name] = _Kept(table[depth], before, depth)
                if before in self._kept:
                    self._kept[before].followers += 1
            kept.used = self._clock
            used.append(name)
            before = name
        self._use(used)
        if self.states is not None:
            for name in names[len(used) :]:  # a checkpoint is of no use without the blocks before it
                self.states.forget(name)
        return used

    def free(self, wanted: int) -> bool:
        """Give up kept blocks until ``wanted`` blocks are free; whether they are. Those that a sequence has stay."""
        while self._blocks.free < wanted:
            if not self._drop_one(unshared=True):
                return False
        return True

    def clear(self) -> None:
        """Nothing is kept any more."""
        for name, kept in self._kept.items():
            self._blocks.forget(kept.block)
            if self.states is not None:
                self.states.forget(name)
        self._kept.clear()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every kept block can be reached from a text's begin and followers are counted."""
        followers = dict.fromkeys(self._kept, 0)
        for kept in self._kept.values():
            if kept.depth:
                if kept.before not in self._kept:
                    raise RuntimeError("a block is kept without the one before it")
                followers[kept.before] += 1
        if any(kept.followers != followers[name] for name, kept in self._kept.items()) or len(self._kept) > self._most:
            raise RuntimeError("kept blocks are miscounted")
        if self.states is not None:
            self.states.check_integrity()

    def _use(self, names: Sequence[bytes]) -> None:
        """``names``, of one text from its begin, are used now."""
        for name in reversed(names):
            self._kept[name].used = self._clock
            self._kept.move_to_end(name)

    def _drop_one(self, spare: int = -1, unshared: bool = False) -> bool:
        """The least useful block goes that nothing follows, but none used at ``spare``; whether there was one."""
        ends = (
            name
            for name, kept in self._kept.items()
            if not kept.followers and kept.used != spare and not (unshared and self._blocks.references(kept.block) > 1)
        )
        if (name := next(ends, None)) is None:
            return False
        gone = self._kept.pop(name)
        if gone.before in self._kept:
            self._kept[gone.before].followers -= 1
        self._blocks.forget(gone.block)
        if self.states is not None:
            self.states.forget(name)
        return True

    def _names(self, tokens: Sequence[int], count: int) -> list[bytes]:
        """Of the first ``count`` blocks."""
        name, names = self._model, []
        for first in range(0, count * KV_BLOCK, KV_BLOCK):
            name = blake2b(name + array("q", tokens[first : first + KV_BLOCK]).tobytes(), digest_size=16).digest()
            names.append(name)
        return names
