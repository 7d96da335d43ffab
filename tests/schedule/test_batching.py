"""The scheduler: every request ends, and its text is its own, whatever runs beside it."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fate_moe
from fate_moe.core import KV_BLOCK
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.block_files import BlockFiles
from fate_moe.schedule.executors import default_parallel
from fate_moe.schedule.request import Event, Finished, Piece, Queued, Reading, Request, Sampling, TokenRecord
from fate_moe.schedule.scheduler import QueueFullError, StoppedError, Ticket
from fate_moe.schedule.ticket import Bell
from tests.support.batching import POISON, FakeExecutor, FakeModel, FakeTokenizer


def scheduler_on(executor: FakeExecutor, **options: Any) -> BatchScheduler:
    return BatchScheduler(lambda: (FakeModel(), FakeTokenizer()), make_executor=lambda model: executor, **options)


async def collect(ticket: Ticket) -> list[Event]:
    return [event async for events in ticket for event in events]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert [isinstance(event, Finished) for event in events].count(True) == 1
    return events[-1]


def answers(scheduler: BatchScheduler, *requests: Request) -> list[list[Event]]:
    """The events of all requests, which are there at once."""

    async def run() -> list[list[Event]]:
        return list(await asyncio.gather(*(collect(scheduler.submit(request)) for request in requests)))

    return asyncio.run(run())


def alone(request: Request, any_cut: bool = True, num_states: int = 0, chunk: int | None = None) -> list[Event]:
    scheduler = scheduler_on(FakeExecutor(64, any_cut, num_states=num_states, chunk=chunk), parallel=1)
    try:
        return answers(scheduler, request)[0]
    finally:
        scheduler.close()


_KEPT = tempfile.TemporaryDirectory()  # what one example leaves on the disk, the next one finds
COMMON = [[3] * 70, [4] * 128, [4] * 150, [5, 6]]  # prompts that several requests have


@st.composite
def requests(draw: st.DrawFn) -> Request:
    length = draw(st.one_of(st.integers(1, 5), st.integers(60, 70), st.integers(1, 200)))
    prompt = draw(st.one_of(st.lists(st.integers(1, POISON - 1), min_size=length, max_size=length), st.sampled_from(COMMON)))
    sampling = Sampling(
        temperature=draw(st.sampled_from([None, 0.0, 1.3])),
        repetition_penalty=draw(st.sampled_from([None, 1.2])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 9)),
    )
    stop = draw(st.sampled_from([(), ("ab",), ("c",)]))
    logprobs = draw(st.sampled_from([None, 0, 2]))
    tokens, endless = draw(st.integers(0, 90)), draw(st.booleans())
    return Request(tuple(prompt), tokens, sampling, stop, endless, logprobs, prompt_logprobs=draw(st.booleans()))


actions = st.lists(
    st.one_of(requests(), st.just("fail"), st.tuples(st.sampled_from(["cancel", "step"]), st.integers(1, 9))), max_size=14
)


@settings(max_examples=40, deadline=None)
@given(actions, st.integers(1, 4), st.integers(5, 12), st.sampled_from(["any cut", "on disk", "states", "whole prompts", "chunks"]))
def test_a_text_is_what_it_is_alone(actions: list[Any], parallel: int, num_blocks: int, kind: str) -> None:
    """Whatever else comes, is cancelled, fails, or has to give its blocks away, and whenever it does."""
    any_cut, chunk = kind in ("any cut", "on disk", "states"), 2 * KV_BLOCK if kind == "chunks" else None
    states, home = parallel + num_blocks % 3 if kind == "states" else 0, Path(_KEPT.name)
    files = BlockFiles(home, ("b" if states else "a") * 32, "fake", 8 * KV_BLOCK, 20_000) if kind in ("on disk", "states") else None
    state_files = BlockFiles(home, "c" * 32, "fake", 8, 20_000) if states else None
    executor = FakeExecutor(num_blocks, any_cut, False, files, num_states=states, state_files=state_files, chunk=chunk)
    scheduler = scheduler_on(executor, parallel=parallel, capacity=8)
    taken: list[tuple[Request, Ticket]] = []
    left: set[Ticket] = set()

    async def run() -> list[list[Event]]:
        for action in actions:
            if action == "fail":
                action = Request((1, POISON, 2), 5)
            if isinstance(action, Request):
                if not any_cut:  # a pass of the model's own, which the fake one does not have
                    action = replace(action, prompt_logprobs=False)
                try:
                    taken.append((action, scheduler.submit(action)))
                except QueueFullError:
                    assert scheduler.waiting == 8
            elif action[0] == "cancel" and taken:
                ticket = taken[action[1] % len(taken)][1]
                ticket.cancel()
                left.add(ticket)
            elif action[0] == "step":
                executor.gate.release(action[1])
                await asyncio.sleep(0.002)
            assert scheduler.running <= parallel
        executor.is_open = True
        return list(await asyncio.wait_for(asyncio.gather(*(collect(ticket) for _, ticket in taken)), 30))

    try:
        found = asyncio.run(run())
    finally:
        executor.is_open = True
        scheduler.close()
    kept = len(executor.prefixes or ())
    assert (scheduler.running, scheduler.waiting, executor.blocks.used) == (0, 0, kept)
    for (request, ticket), events in zip(taken, found, strict=True):
        end = end_of(events)
        if POISON in request.prompt:
            assert end.reason in ("error", "cancelled")
            continue
        want = alone(request, any_cut, states, chunk)
        if end.reason == "cancelled":
            assert ticket in left
            assert text_of(want).startswith(text_of(events))
            continue
        usage = replace(end.usage, cached_tokens=0)  # of those that others left
        assert (text_of(events), end.reason, usage) == (text_of(want), end_of(want).reason, end_of(want).usage)
        assert tokens_of(events) == tokens_of(want)
        assert end.prompt == end_of(want).prompt
        positions = [event.position for event in events if isinstance(event, Queued)]
        assert positions == sorted(positions, reverse=True)


def tokens_of(events: list[Event]) -> list[Any]:
    return [record for event in events if isinstance(event, Piece) for record in event.tokens]


@pytest.mark.parametrize("any_cut", [True, False])
def test_who_has_to_give_its_blocks_away_goes_on_where_it_was(any_cut: bool) -> None:
    executor = FakeExecutor(8, any_cut)
    scheduler = scheduler_on(executor, parallel=4)
    asked = [Request((number, 2, 3), 3 * KV_BLOCK, Sampling(seed=number), ignore_eos=True) for number in range(1, 5)]
    found = answers(scheduler, *asked)
    assert scheduler.load.preemptions > 0
    scheduler.close()
    for request, events in zip(asked, found, strict=True):
        assert text_of(events) == text_of(alone(request, any_cut))
        assert end_of(events).usage.completion_tokens == 3 * KV_BLOCK


@pytest.mark.parametrize("leaves", [False, True])
def test_answers_to_one_prompt_have_it_read_once_even_if_who_read_it_leaves(leaves: bool) -> None:
    executor = FakeExecutor(64, is_open=False)
    scheduler = scheduler_on(executor, parallel=4)
    asked = [Request((7,) * 1000, 5, Sampling(seed=seed), ignore_eos=True) for seed in range(3)]

    async def run() -> list[list[Event]]:
        tickets = [scheduler.submit(request) for request in asked]  # no step is done until all are there
        if leaves:
            tickets[0].cancel()
        executor.is_open = True
        return list(await asyncio.gather(*map(collect, tickets)))

    found = asyncio.run(run())
    scheduler.close()
    assert executor.blocks.used == len(executor.prefixes or ())
    assert scheduler.load.rows <= 1000 + 3 * 5 + leaves * 512
    for request, events in list(zip(asked, found, strict=True))[leaves:]:
        assert text_of(events) == text_of(alone(request))


def test_a_request_that_can_never_fit_is_refused_and_others_go_on() -> None:
    scheduler = scheduler_on(FakeExecutor(2), parallel=2)
    large, small = answers(scheduler, Request((1,), 3 * KV_BLOCK), Request((1,), 3, ignore_eos=True))
    assert end_of(large).reason == "error"
    assert "128" in end_of(large).message
    assert end_of(small).reason == "length"
    scheduler.close()


def test_many_texts_share_a_step_and_a_long_prompt_does_not_stop_them() -> None:
    executor = FakeExecutor(96, is_open=False)
    scheduler = scheduler_on(executor, parallel=4)
    short = [Request((number,), 14, ignore_eos=True) for number in range(1, 4)]

    async def run() -> None:
        tickets = [scheduler.submit(request) for request in (*short, Request((5,) * 5000, 2, ignore_eos=True))]
        executor.is_open = True
        await asyncio.gather(*map(collect, tickets))

    asyncio.run(run())
    scheduler.close()
    beside = [step for step in executor.steps if any(len(one.tokens) > 100 for one in step)]
    assert sum(len(step) == 4 for step in beside) >= 9  # all three write while the prompt is read
    assert all(sum(len(one.tokens) for one in step) <= 256 for step in beside if len(step) > 1)
    assert max(sum(len(one.tokens) for one in step) for step in executor.steps) == 512


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    executor = FakeExecutor(64)
    scheduler = scheduler_on(executor, parallel=2)
    _, short = answers(scheduler, Request((5,) * 3000, 1), Request((6,) * 100, 1))
    assert end_of(short).timings.prompt_seconds > 0
    scheduler.close()
    assert [len(one.tokens) for one in executor.steps[0]] in ([100, 412], [512])
    first = next(index for index, step in enumerate(executor.steps) if len(step) == 2)
    assert first <= 1


def test_the_default_number_of_sequences_is_by_the_cache() -> None:
    assert [default_parallel(FakeExecutor(blocks)) for blocks in (1, 8, 32, 1000)] == [1, 1, 4, 8]


def test_a_cancelled_request_in_the_queue_ends_at_once_and_others_move_up() -> None:
    async def run() -> None:
        executor = FakeExecutor(8, is_open=False)
        scheduler = scheduler_on(executor, parallel=1)
        tickets = [scheduler.submit(Request((number,), 1)) for number in range(1, 4)]
        tickets[1].cancel()
        assert end_of(await asyncio.wait_for(collect(tickets[1]), 5)).reason == "cancelled"
        executor.is_open = True
        assert Queued(1) in await asyncio.wait_for(collect(tickets[2]), 5)
        await asyncio.to_thread(scheduler.close)
        with pytest.raises(StoppedError):
            scheduler.submit(Request((1,), 1))

    asyncio.run(run())


def test_texts_are_the_same_from_memory_from_the_disk_and_after_damage(tmp_path: Path) -> None:
    """Conversations that begin alike, by several processes one after the other, in little memory and on little disk."""
    dice = Random(3)
    shared = [dice.randrange(1, POISON) for _ in range(5 * KV_BLOCK)]
    talks: list[list[int]] = [shared[: 64 * dice.randrange(1, 6)] + [number] * dice.randrange(1, 90) for number in range(1, 7)]
    from_disk = 0
    for process in range(5):
        files = BlockFiles(tmp_path, "a" * 32, "fake", 8 * KV_BLOCK, 24 * (8 * KV_BLOCK + 150))
        scheduler = scheduler_on(FakeExecutor(14, files=files), parallel=2)
        asked = [Request(tuple(talk), 7, Sampling(seed=1), ignore_eos=True, top_logprobs=0) for talk in dice.sample(talks, 4)]
        found = answers(scheduler, *asked)
        scheduler.close()
        for request, events in zip(asked, found, strict=True):
            assert tokens_of(events) == tokens_of(alone(request))
            talk = next(talk for talk in talks if tuple(talk) == request.prompt)
            talk += [record.token for record in tokens_of(events)] + [dice.randrange(1, POISON)] * 20
        from_disk += files.read_bytes
        if process:
            kept = sorted((tmp_path / ("a" * 32)).iterdir())
            for path in dice.sample(kept, 2):
                path.write_bytes(path.read_bytes()[:-1] + b"?")
        assert sum(path.stat().st_size for path in (tmp_path / ("a" * 32)).iterdir()) <= 24 * (8 * KV_BLOCK + 150)
    assert from_disk > 10 * 8 * KV_BLOCK


def test_a_full_queue_refuses() -> None:
    async def run() -> None:
        executor = FakeExecutor(8, is_open=False)
        scheduler = scheduler_on(executor, parallel=1, capacity=2)
        one = Request((1,), 1, ignore_eos=True)
        tickets = [scheduler.submit(one)]
        while not scheduler.running:
            await asyncio.sleep(0.001)
        tickets += [scheduler.submit(one) for _ in range(2)]
        with pytest.raises(QueueFullError) as refused:
            scheduler.submit(one)
        assert refused.value.retry_seconds == 0  # nothing is known of what requests take
        executor.is_open = True
        await asyncio.to_thread(scheduler.close, 5.0)
        assert [end_of(await collect(ticket)).reason for ticket in tickets] == ["length"] * 3

    asyncio.run(run())


def test_a_full_queue_says_in_what_time_those_that_wait_should_have_begun() -> None:
    async def run() -> None:
        executor = FakeExecutor(8)
        scheduler = scheduler_on(executor, parallel=1, capacity=2)
        took = [end_of(await collect(scheduler.submit(Request((1,), 4, ignore_eos=True)))).timings for _ in range(3)]
        executor.is_open = False
        tickets = [scheduler.submit(Request((1,), 1))]
        while not scheduler.running:
            await asyncio.sleep(0.001)
        tickets += [scheduler.submit(Request((1,), 1)) for _ in range(2)]
        with pytest.raises(QueueFullError) as refused:
            scheduler.submit(Request((1,), 1))
        mean = sum(one.prompt_seconds + one.decode_seconds for one in took) / len(took)
        assert refused.value.retry_seconds == pytest.approx(2 * mean)
        executor.is_open = True
        await asyncio.to_thread(scheduler.close, 5.0)

    asyncio.run(run())


def test_what_comes_while_the_loop_is_busy_comes_at_once_and_wakes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rung, calls = Bell._rung, list[Bell]()

    def counted(bell: Bell) -> None:
        calls.append(bell)
        rung(bell)

    monkeypatch.setattr(Bell, "_rung", counted)

    async def run() -> None:
        scheduler = scheduler_on(FakeExecutor(8))
        ticket = scheduler.submit(Request((1,), 1, ignore_eos=True))
        deadline = time.monotonic() + 5
        while (scheduler.running or scheduler.waiting) and time.monotonic() < deadline:
            time.sleep(0.001)  # the loop is busy
        scheduler.close()
        items = [events async for events in ticket]
        assert [[type(event) for event in events] for events in items] == [[Queued, Reading, Piece, Finished]]
        assert len(calls) == 1

    asyncio.run(run())


def test_a_model_that_does_not_load_ends_what_waits() -> None:
    async def run() -> None:
        go, told = threading.Event(), list[Any]()

        def load() -> tuple[Any, Any]:
            go.wait(5)
            raise fate_moe.StoreError("torn")

        scheduler = BatchScheduler(load, on_loaded=told.append)
        ticket = scheduler.submit(Request((0,), 1))
        go.set()
        end = end_of(await asyncio.wait_for(collect(ticket), 5))
        assert (end.reason, end.message) == ("error", "torn")
        assert isinstance(told[0], fate_moe.StoreError)

    asyncio.run(run())


def test_a_prompt_of_one_token_has_nothing_to_say_of_itself() -> None:
    scheduler = scheduler_on(FakeExecutor(8))
    end = end_of(answers(scheduler, Request((1,), 0, prompt_logprobs=True))[0])
    assert (end.reason, end.prompt) == ("length", (TokenRecord(1),))
    scheduler.close()


@pytest.mark.parametrize("where", ["making a constraint", "applying it"])
def test_a_request_that_fails_ends_and_those_beside_it_go_on(where: str) -> None:
    def fail(*args: Any) -> Any:
        raise ValueError("no such grammar")

    good_one = Request((2,), 4, Sampling(seed=3), ignore_eos=True)
    constraint: Callable[[], Any] = fail if where == "making a constraint" else lambda: fail
    scheduler = scheduler_on(FakeExecutor(8), parallel=2)
    bad, good = answers(scheduler, Request((1,), 4, constraint=constraint), good_one)
    assert (end_of(bad).reason, end_of(bad).message) == ("error", "ValueError: no such grammar")
    assert text_of(good) == text_of(alone(good_one))
    scheduler.close()


def test_an_executor_that_fails_as_a_whole_ends_what_it_ran_and_the_next_is_served() -> None:
    executor = FakeExecutor(8)
    scheduler = scheduler_on(executor, parallel=2)
    step, executor.step = executor.step, lambda rows: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    assert end_of(answers(scheduler, Request((1,), 4))[0]).reason == "error"
    executor.step = step  # type: ignore[method-assign]
    assert end_of(answers(scheduler, Request((1,), 4, ignore_eos=True))[0]).reason == "length"
    scheduler.close()
    assert torch.tensor(executor.blocks.used) == 0
