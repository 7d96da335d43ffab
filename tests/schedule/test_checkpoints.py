"""Where the states of texts are written down, and which of these checkpoints go first."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from fate_moe.core import KV_BLOCK
from fate_moe.schedule import block_files
from fate_moe.schedule.block_files import BlockFiles
from fate_moe.schedule.blocks import OutOfBlocksError
from fate_moe.schedule.request import Request, Sampling
from fate_moe.schedule.states import Mark, States
from tests.schedule.test_batching import answers, end_of, scheduler_on, text_of
from tests.support.batching import FakeExecutor


def made(states: States, *names: bytes, passing: bool = False) -> None:
    taken = states.take([Mark(KV_BLOCK, name, passing) for name in names])
    states.put(taken, written=True)
    states.check_integrity()


def test_what_was_begun_from_longest_ago_goes_first_and_before_it_what_is_in_passing() -> None:
    states = States(4)
    states.enter(1)
    made(states, b"a", b"b")
    made(states, b"p", passing=True)
    made(states, b"q", passing=True)
    assert b"q" not in states, "what is in passing takes no other's room"
    states.use(b"a")
    made(states, b"c")
    assert b"p" not in states
    made(states, b"d")
    assert [name in states for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    for sequence in (2, 3, 4):
        states.enter(sequence)
    assert len(states) == 0
    with pytest.raises(OutOfBlocksError, match="states of 4 sequences"):
        states.enter(5)
    states.leave(2)
    assert [mark.name for mark, _ in states.take([Mark(KV_BLOCK, b"e"), Mark(KV_BLOCK, b"f")])] == [b"e"]


def test_no_more_are_kept_than_may_be_and_what_was_not_written_is_none() -> None:
    states = States(4, most_kept=1)
    made(states, b"a")
    made(states, b"b")
    assert (b"a" in states, b"b" in states) == (False, True)
    states.put(states.take([Mark(KV_BLOCK, b"c")]), written=False)
    states.check_integrity()
    assert b"c" not in states
    made(States(2, most_kept=0), b"a")


def request(*prompt: int, new: int = 4) -> Request:
    return Request(prompt, new, Sampling(temperature=0), ignore_eos=True)


def test_a_text_begins_where_another_ended_and_where_two_parted() -> None:
    executor = FakeExecutor(64, num_states=24)
    scheduler = scheduler_on(executor, parallel=1)

    def cached(asked: Request) -> int:
        """The text is that of a scheduler where nothing is kept."""
        alone = scheduler_on(FakeExecutor(64, num_states=1), parallel=1)
        events, want = answers(scheduler, asked)[0], answers(alone, asked)[0]
        alone.close()
        assert text_of(events) == text_of(want)
        return end_of(events).usage.cached_tokens

    prompt = tuple(range(1, 15)) * 12  # 168 tokens
    assert cached(request(*prompt, new=40)) == 0
    assert cached(request(*prompt)) == 128, "the last block of the prompt that leaves a token"
    answer = [ord(letter) - 97 for letter in text_of(answers(scheduler, request(*prompt, new=40))[0])]
    assert cached(request(*prompt, *answer, 3)) == 192, "the last block of the text"
    parting = [prompt[:70] + (number,) * 100 for number in (1, 2, 3)]
    assert cached(request(*parting[0])) == 0, "nobody knew that a text would part here"
    assert cached(request(*parting[1])) == 64
    assert cached(request(*parting[2])) == 64
    long = (5,) * 2500
    assert cached(request(*long)) == 0
    assert cached(request(*long[:1100], 6, 6)) == 1024, "in passing"
    assert cached(request(*long[:1100], 7, 7)) == 1088, "where they parted"
    scheduler.close()


def test_checkpoints_are_there_after_a_restart(tmp_path: Path) -> None:
    """And where one is torn, or its blocks are gone, the text is the same."""
    asked, found = request(*(1, 2, 3) * 90), []

    def after_a_start(cached: int) -> None:
        files, states = (
            BlockFiles(tmp_path, letter * 32, "fake", size, 1 << 20) for letter, size in (("a", 8 * KV_BLOCK), ("b", 8))
        )
        scheduler = scheduler_on(FakeExecutor(16, files=files, num_states=2, state_files=states), parallel=1)
        events = answers(scheduler, asked)[0]
        found.append(text_of(events))
        kept = scheduler.kept_files(asked.prompt)
        scheduler.close()
        assert end_of(events).usage.cached_tokens == cached
        assert all((tmp_path / path).is_file() for path in kept)
        assert len(kept) == len(set(kept)) == 5

    after_a_start(0)
    after_a_start(256)
    checkpoint = next((tmp_path / ("b" * 32)).iterdir())
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    after_a_start(0)
    after_a_start(256)
    block = min((tmp_path / ("a" * 32)).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    block.unlink()  # the last one: of one text it goes first
    after_a_start(0)
    after_a_start(256)
    assert len(set(found)) == 1


def test_a_disk_that_takes_nothing_is_said_once_and_answers_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "it is full")

    monkeypatch.setattr(block_files, "_write_whole", fail)
    files, states = (BlockFiles(tmp_path, letter * 32, "fake", size, 1 << 20) for letter, size in (("a", 8 * KV_BLOCK), ("b", 8)))
    scheduler = scheduler_on(FakeExecutor(16, files=files, num_states=2, state_files=states), parallel=1)
    with caplog.at_level(logging.WARNING):
        found = [text_of(answers(scheduler, request(*(1, 2, 3) * 90))[0]) for _ in range(3)]
        scheduler.close()
    assert len(set(found)) == 1
    assert ["no longer kept on the disk" in record.message for record in caplog.records] == [True]
    assert (files.is_writing, states.is_writing) == (False, False)
