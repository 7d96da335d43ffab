"""Reused blocks hold what their tokens say, whatever was kept, dropped and written over in between."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from fate_moe.core import KV_BLOCK
from fate_moe.schedule.blocks import Blocks
from fate_moe.schedule.prefixes import Prefixes

BLOCKS = 12


def text_of(pieces: list[int], rest: int) -> list[int]:
    """Blocks of equal tokens, so that beginnings are often the same, and a few tokens more."""
    return [piece for piece in pieces for _ in range(KV_BLOCK)] + list(range(rest))


texts = st.builds(text_of, st.lists(st.integers(0, 2), max_size=4), st.integers(1, 5))


class Machine(RuleBasedStateMachine):
    """``held``: what a pool of tensors would hold, by block and position: the tokens up to there, as keys depend on all of them."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(BLOCKS)
        self.prefixes = Prefixes(self.blocks, b"model", most=8)
        self.held: list[list[Any]] = [[None] * KV_BLOCK for _ in range(BLOCKS)]

    @rule(target=running, text=texts)
    def begin(self, text: list[int]) -> tuple[int, list[int]]:
        sequence, known = self.prefixes.begin(text)
        assert known < len(text)
        assert known % KV_BLOCK == 0
        count = len(text) - known
        if not self.prefixes.free(self.blocks.needed(sequence, count)):
            self.blocks.drop(sequence)
            return 0, []
        for source, to in self.blocks.append(sequence, count):
            self.held[to] = list(self.held[source])
        table = self.blocks.table(sequence)
        for position in range(known, len(text)):
            self.held[table[position // KV_BLOCK]][position % KV_BLOCK] = tuple(text[: position + 1])
        return sequence, text

    @rule(made=consumes(running), keep=st.booleans())
    def end(self, made: tuple[int, list[int]], keep: bool) -> None:
        sequence, text = made
        if sequence:
            table = self.blocks.table(sequence)
            for position in range(len(text)):
                assert self.held[table[position // KV_BLOCK]][position % KV_BLOCK] == tuple(text[: position + 1])
            if keep:
                self.prefixes.keep(sequence, text)
            self.blocks.drop(sequence)

    @precondition(lambda self: bool(len(self.prefixes)))
    @rule()
    def clear(self) -> None:
        self.prefixes.clear()

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check_integrity()
        self.prefixes.check_integrity()


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPrefixes = Machine.TestCase


def test_the_same_text_again_is_found_but_for_its_last_token() -> None:
    blocks = Blocks(8)
    prefixes, text = Prefixes(blocks), list(range(3 * KV_BLOCK))
    sequence, known = prefixes.begin(text)
    assert known == 0
    blocks.append(sequence, len(text))
    prefixes.keep(sequence, text)
    blocks.drop(sequence)
    assert prefixes.begin(text)[1] == 2 * KV_BLOCK
    assert prefixes.begin([*text, 1])[1] == 3 * KV_BLOCK
    assert prefixes.begin([1, *text[1:]])[1] == 0
    assert prefixes.hits == 5 * KV_BLOCK


def test_other_models_have_other_names() -> None:
    first, second = Prefixes(Blocks(1), b"a"), Prefixes(Blocks(1), b"b")
    assert first._names([0] * KV_BLOCK, 1) != second._names([0] * KV_BLOCK, 1)


def test_what_was_used_longest_ago_goes_first_and_its_end_before_its_begin() -> None:
    blocks = Blocks(4)
    prefixes = Prefixes(blocks)
    old, new = [0] * (2 * KV_BLOCK), [1] * (2 * KV_BLOCK)
    for text in (old, new):
        sequence, _ = prefixes.begin(text)
        blocks.append(sequence, len(text))
        prefixes.keep(sequence, text)
        blocks.drop(sequence)
    assert prefixes.free(1)
    assert [prefixes.begin([*text, 5])[1] // KV_BLOCK for text in (old, new)] == [1, 2]
