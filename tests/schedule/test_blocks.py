"""Blocks of the KV cache against sequences that are plain lists: nothing that a sequence wrote is ever another's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Names
from hypothesis.stateful import RuleBasedStateMachine, consumes, invariant, multiple, rule

from fate_moe.core import KV_BLOCK
from fate_moe.schedule.blocks import Blocks, OutOfBlocksError, blocks_for

NUM_BLOCKS = 7


class BlockMachine(RuleBasedStateMachine):
    """``memory`` is what the blocks hold, ``texts`` what the sequences should hold."""

    names = Names("names")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(NUM_BLOCKS)
        self.memory: list[list[Any]] = [[None] * KV_BLOCK for _ in range(NUM_BLOCKS)]
        self.texts: dict[int, list[int]] = {}
        self.written = 0

    def state(self) -> Any:
        return self.blocks.free, {name: (self.blocks.length(name), self.blocks.table(name)) for name in self.texts}

    @rule(target=names)
    def new(self) -> int:
        name = self.blocks.new()
        assert name not in self.texts
        self.texts[name] = []
        return name

    @rule(target=names, name=names)
    def fork(self, name: int) -> int:
        free, made = self.blocks.free, self.blocks.fork(name)
        self.texts[made] = list(self.texts[name])
        assert self.blocks.free == free
        return made

    @rule(name=consumes(names))
    def drop(self, name: int) -> None:
        self.blocks.drop(name)
        del self.texts[name]

    @rule(name=names, count=st.one_of(st.integers(1, 3), st.integers(1, 3 * KV_BLOCK)))
    def append(self, name: int, count: int) -> None:
        before, needed = self.state(), self.blocks.needed(name, count)
        try:
            copies = self.blocks.append(name, count)
        except OutOfBlocksError:
            assert needed > before[0]
            assert self.state() == before
            return
        assert self.blocks.free == before[0] - needed
        for old, new in copies:
            self.memory[new] = list(self.memory[old])
        table, text = self.blocks.table(name), self.texts[name]
        for position in range(len(text), len(text) + count):
            self.written += 1
            text.append(self.written)
            self.memory[table[position // KV_BLOCK]][position % KV_BLOCK] = self.written

    @rule(name=names, tokens=st.integers(0, NUM_BLOCKS * KV_BLOCK + 1))
    def reserve(self, name: int, tokens: int) -> None:
        before = self.state()
        try:
            self.blocks.reserve(name, tokens)
        except OutOfBlocksError:
            assert blocks_for(tokens) - len(before[1][name][1]) > before[0]
            assert self.state() == before
            return
        assert len(self.blocks.table(name)) >= blocks_for(tokens)
        shared = self.blocks.references(self.blocks.table(name)[-1]) > 1 if self.blocks.table(name) else False
        if not shared and tokens > self.blocks.length(name):
            assert self.blocks.needed(name, tokens - self.blocks.length(name)) <= 1  # a shared block may be copied

    @rule(name=names, length=st.integers(0, NUM_BLOCKS * KV_BLOCK))
    def cut(self, name: int, length: int) -> None:
        self.blocks.cut(name, length)
        del self.texts[name][length:]
        assert len(self.blocks.table(name)) == blocks_for(len(self.texts[name]))

    @rule(target=names)
    def nothing(self) -> Any:
        return multiple()

    @invariant()
    def every_sequence_reads_what_it_wrote(self) -> None:
        self.blocks.check_integrity()
        for name, text in self.texts.items():
            table = self.blocks.table(name)
            assert self.blocks.length(name) == len(text)
            assert [self.memory[table[position // KV_BLOCK]][position % KV_BLOCK] for position in range(len(text))] == text
        assert self.blocks.used <= sum(len(self.blocks.table(name)) for name in self.texts)


TestBlocks = BlockMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_all_blocks_come_back() -> None:
    blocks = Blocks(3)
    first = blocks.new()
    blocks.append(first, 2 * KV_BLOCK)
    second = blocks.fork(first)
    assert blocks.append(second, 1) == []  # the last block is full: nothing to copy
    assert blocks.free == 0
    with pytest.raises(OutOfBlocksError):
        blocks.append(first, 1)
    blocks.drop(first)
    assert blocks.free == 0
    blocks.drop(second)
    assert blocks.free == 3


def test_integrity_is_checked() -> None:
    blocks = Blocks(2)
    blocks.append(blocks.new(), 1)
    blocks._references[0] += 1
    with pytest.raises(RuntimeError):
        blocks.check_integrity()
