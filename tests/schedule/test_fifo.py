"""The queue: every request ends, in order, and its text is its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fate_moe
from fate_moe import demo
from fate_moe.engine.prepare import load_tokenizer, store_for
from fate_moe.schedule.fifo import FifoScheduler
from fate_moe.schedule.generation import _Penalties
from fate_moe.schedule.request import Event, Finished, Piece, Queued, Reading, Request, Sampling, Usage
from fate_moe.schedule.scheduler import QueueFullError, StoppedError, Ticket

PROMPT = (1094, 326, 260, 1456, 1106)


class Stepped(FifoScheduler):
    """Requests that generate nothing and end when the test says so; ``order`` is the order in which they ran."""

    def __init__(self, capacity: int) -> None:
        self.order: list[int] = []
        self.steps = threading.Semaphore(0)
        super().__init__(lambda: (None, None), capacity)

    def _serve(self, ticket: Any, model: Any, tokenizer: Any) -> Finished:
        self.order.append(ticket.request.prompt[0])
        while not ticket.is_cancelled and not self.steps.acquire(timeout=0.001):
            pass
        return Finished("cancelled" if ticket.is_cancelled else "length", Usage(1, 0))


async def collect(ticket: Ticket) -> list[Event]:
    return [event async for events in ticket for event in events]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["submit", "cancel first", "cancel last", "step", "pause"]), max_size=25), st.integers(1, 4))
def test_everything_ends_in_order_within_bounds(actions: list[str], capacity: int) -> None:
    async def run() -> None:
        scheduler = Stepped(capacity)
        tickets: list[Ticket] = []
        for number, action in enumerate(actions):
            if action == "submit":
                full = scheduler.waiting >= capacity
                try:
                    tickets.append(scheduler.submit(Request((number,), 1)))
                except QueueFullError:
                    assert full
            elif action == "cancel first" and tickets:
                tickets[0].cancel()
            elif action == "cancel last" and tickets:
                tickets[-1].cancel()
            elif action == "step":
                scheduler.steps.release()
            else:
                await asyncio.sleep(0.001)
            assert scheduler.waiting <= capacity
            assert scheduler.running <= 1
        await asyncio.to_thread(scheduler.close)
        for ticket in tickets:
            events = await asyncio.wait_for(collect(ticket), 5)
            positions = [event.position for event in events if isinstance(event, Queued)]
            assert positions == sorted(positions, reverse=True)
            assert [isinstance(event, Finished) for event in events].count(True) == 1
        assert scheduler.order == sorted(scheduler.order)
        with pytest.raises(StoppedError):
            scheduler.submit(Request((0,), 1))

    asyncio.run(run())


def test_a_cancelled_request_in_the_queue_ends_at_once_and_others_move_up() -> None:
    async def run() -> None:
        scheduler = Stepped(4)
        tickets = [scheduler.submit(Request((number,), 1)) for number in range(3)]
        tickets[1].cancel()
        assert isinstance((await asyncio.wait_for(collect(tickets[1]), 5))[-1], Finished)
        scheduler.steps.release(2)
        events = await asyncio.wait_for(collect(tickets[2]), 5)
        assert Queued(1) in events
        await asyncio.to_thread(scheduler.close)

    asyncio.run(run())


def test_what_comes_while_the_loop_is_busy_comes_at_once_and_wakes_it_once() -> None:
    async def run() -> None:
        scheduler, calls = Stepped(4), list[Any]()
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *arguments: calls.append(call(*arguments))  # type: ignore[assignment]
        ticket = scheduler.submit(Request((0,), 1))
        scheduler.steps.release()
        deadline = time.monotonic() + 5
        while (scheduler.running or scheduler.waiting) and time.monotonic() < deadline:
            time.sleep(0.001)  # the loop is busy
        scheduler.close()
        items = [events async for events in ticket]
        assert [[type(event) for event in events] for events in items] == [[Queued, Finished]]
        assert len(calls) == 1

    asyncio.run(run())


def test_closing_lets_what_was_taken_end() -> None:
    async def run() -> None:
        scheduler = Stepped(4)
        tickets = [scheduler.submit(Request((number,), 1)) for number in range(3)]
        scheduler.steps.release(3)
        await asyncio.to_thread(scheduler.close, 5.0)
        ends = [(await collect(ticket))[-1] for ticket in tickets]
        assert [end.reason for end in ends if isinstance(end, Finished)] == ["length"] * 3

    asyncio.run(run())


def test_a_model_that_does_not_load_ends_what_waits() -> None:
    async def run() -> None:
        go, told = threading.Event(), list[Any]()

        def load() -> tuple[Any, Any]:
            go.wait(5)
            raise fate_moe.StoreError("torn")

        scheduler = FifoScheduler(load, on_loaded=told.append)
        ticket = scheduler.submit(Request((0,), 1))
        go.set()
        end = (await asyncio.wait_for(collect(ticket), 5))[-1]
        assert isinstance(end, Finished)
        assert (end.reason, end.message) == ("error", "torn")
        assert isinstance(told[0], fate_moe.StoreError)

    asyncio.run(run())


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    model, tokenizer = fate_moe.load(expert_cache="25%", context_length=1024)
    with model.fate:
        yield model, tokenizer


@pytest.fixture(scope="module")
def scheduler(loaded: tuple[Any, Any]) -> Iterator[FifoScheduler]:
    scheduler = FifoScheduler(lambda: loaded, 64)
    yield scheduler
    scheduler.close()


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def answer(scheduler: FifoScheduler, *requests: Request) -> list[list[Event]]:
    """The events of all requests, which are there at once."""

    async def run() -> list[list[Event]]:
        return list(await asyncio.gather(*(collect(scheduler.submit(request)) for request in requests)))

    return asyncio.run(run())


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_greedy_text_is_what_generate_writes(scheduler: FifoScheduler, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    events = answer(scheduler, Request(PROMPT, 24, Sampling(temperature=0)))[0]
    inputs = torch.tensor([PROMPT])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert text_of(events) == tokenizer.decode(output[0, len(PROMPT) :], skip_special_tokens=True)
    end = end_of(events)
    assert (end.reason, end.usage) == ("length", Usage(5, 24))
    assert end.timings.decode_tokens_per_second > 0
    assert any(isinstance(event, Reading) for event in events)


def test_a_seeds_text_is_the_same_alone_and_among_others(scheduler: FifoScheduler) -> None:
    request = Request(PROMPT, 12, Sampling(seed=7, temperature=1.0))
    alone = text_of(answer(scheduler, request)[0])
    others = [Request(PROMPT[:3], 5, Sampling(seed=seed, temperature=1.5)) for seed in range(3)]
    among = answer(scheduler, *others, request, Request(PROMPT, 3), request)
    assert text_of(among[3]) == text_of(among[5]) == alone
    assert text_of(answer(scheduler, Request(PROMPT, 12, Sampling(seed=8, temperature=1.0)))[0]) != alone


def test_no_seed_is_another_text_each_time(scheduler: FifoScheduler) -> None:
    request = Request(PROMPT, 16, Sampling(temperature=1.5))
    assert len({text_of(events) for events in answer(scheduler, *[request] * 3)}) == 3


def test_a_stop_string_ends_the_text(scheduler: FifoScheduler) -> None:
    whole = text_of(answer(scheduler, Request(PROMPT, 24, Sampling(temperature=0)))[0])
    stop = whole[9:15]
    events = answer(scheduler, Request(PROMPT, 24, Sampling(temperature=0), stop=(stop, "never")))[0]
    assert text_of(events) == whole[: whole.find(stop)]
    assert (end_of(events).reason, end_of(events).stop) == ("stop", stop)
    assert end_of(events).usage.completion_tokens < 24


def test_bias_penalties_and_logprobs(scheduler: FifoScheduler) -> None:
    greedy = Sampling(temperature=0)
    plain = answer(scheduler, Request(PROMPT, 8, greedy, top_logprobs=2, prompt_logprobs=True))[0]
    records = [record for event in plain if isinstance(event, Piece) for record in event.tokens]
    assert len(records) == 8
    assert all(len(record.top) == 2 and record.logprob is not None for record in records)
    assert all(record.top[0][1] >= (record.logprob or 0) for record in records)
    prompt = end_of(plain).prompt
    assert [record.token for record in prompt] == list(PROMPT)
    assert prompt[0].logprob is None
    # The last token of a prompt has the log probability that it had when it was generated.
    longer = answer(scheduler, Request((*PROMPT, records[0].token), 0, greedy, top_logprobs=0, prompt_logprobs=True))[0]
    assert end_of(longer).prompt[-1].logprob == pytest.approx(records[0].logprob, abs=0.02)

    def tokens(**options: Any) -> list[int]:
        events = answer(scheduler, Request(PROMPT, 8, Sampling(temperature=0, **options), top_logprobs=0))[0]
        return [record.token for event in events if isinstance(event, Piece) for record in event.tokens]

    assert tokens(logit_bias={500: 100.0}) == [500] * 8
    assert len(set(tokens(logit_bias={500: 100.0, 501: 99.5}, presence_penalty=2.0))) > 1
    assert set(tokens(logit_bias={500: 100.0, 501: 99.0}, frequency_penalty=2.0)) == {500, 501}


def test_penalties_are_openais() -> None:
    scores = torch.zeros(1, 5)
    prompt_and_text = torch.tensor([[1, 1, 2, 3, 3, 3, 4]])
    assert _Penalties(2, 0.5, 0.25)(prompt_and_text, scores).tolist() == [[0.0, 0.0, -0.75, -1.25, -0.75]]


def test_cancelling_while_the_prompt_is_read(scheduler: FifoScheduler) -> None:
    async def run() -> Finished:
        ticket = scheduler.submit(Request(PROMPT * 150, 50))
        async for events in ticket:
            if any(isinstance(event, Reading) for event in events):
                ticket.cancel()
            assert not any(isinstance(event, Piece) for event in events)
        assert isinstance(events[-1], Finished)
        return events[-1]

    end = asyncio.run(run())
    assert (end.reason, end.usage.completion_tokens) == ("cancelled", 0)
    assert end_of(answer(scheduler, Request(PROMPT, 2))[0]).reason == "length"


def test_cancelling_stops_within_a_token(scheduler: FifoScheduler, loaded: tuple[Any, Any]) -> None:
    """Passes of the model are counted from the moment of cancelling."""
    passes: list[int] = []

    async def run() -> Finished:
        ticket = scheduler.submit(Request(PROMPT, 500, Sampling(seed=0), ignore_eos=True))
        async for events in ticket:
            if any(isinstance(event, Piece) for event in events):
                passes.clear()
                ticket.cancel()
        assert isinstance(events[-1], Finished)
        return events[-1]

    handle = loaded[0].register_forward_hook(lambda module, args, output: passes.append(1))
    try:
        assert asyncio.run(run()).reason == "cancelled"
    finally:
        handle.remove()
    assert len(passes) <= 2  # one may be under way, and another may begin before the event loop hears of the piece


def test_a_request_that_fails_ends_and_the_next_is_served(scheduler: FifoScheduler) -> None:
    def fail() -> Any:
        raise ValueError("no such grammar")

    bad, good = answer(scheduler, Request(PROMPT, 4, constraint=fail), Request(PROMPT, 4))
    assert (end_of(bad).reason, end_of(bad).message) == ("error", "ValueError: no such grammar")
    assert end_of(good).reason == "length"


@pytest.mark.slow
def test_on_a_gpu_tokens_come_from_the_fused_step(checkpoint: Callable[[str], Path]) -> None:
    """What watches the prompt is gone from the layers when generate() looks for hooks."""
    pytest.importorskip("triton")
    from tests.support.engines import simulated_gpu

    model = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless"))
    scheduler = FifoScheduler(lambda: (model, load_tokenizer(demo.MODEL)))
    for options in ({}, {"top_logprobs": 1, "prompt_logprobs": True}):
        before = model.fate.decode.steps
        events = answer(scheduler, Request((3, 17, 90, 5), 4, Sampling(temperature=0), ignore_eos=True, **options))[0]  # type: ignore[arg-type]
        assert model.fate.decode.steps == before + 3
        assert any(isinstance(event, Reading) for event in events)
    scheduler.close()
    model.fate.close()
