"""Requests go to the scheduler, and its events become those of answers: what all APIs are made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fastapi import Request as HttpRequest

from fate_moe.schedule.request import Finished, Piece, Queued, Reading, Request, TokenRecord
from fate_moe.schedule.scheduler import Ticket
from fate_moe.serve.errors import ApiError
from fate_moe.serve.parsing import Delta, PlainReader, Reader, Reasoning, Text, ToolArguments, ToolOpened
from fate_moe.serve.service import Service

__all__ = ["Answer", "Answers", "Call", "ClientGoneError", "Done", "Plan", "Said", "Waiting", "collect", "collected", "now"]


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Plan:
    """One text to generate, and how it is read. ``single_call``: the answer ends after its first call of a tool."""

    request: Request
    reader: Callable[[], Reader] = PlainReader
    single_call: bool = False


@dataclass(frozen=True)
class Waiting:
    """Nothing yet; ``status`` says why."""

    status: str


@dataclass(frozen=True)
class Said:
    """Answer number ``index`` goes on; ``tokens`` are those that became whole, with their log probabilities."""

    index: int
    deltas: Sequence[Delta]
    tokens: Sequence[TokenRecord] = ()


@dataclass(frozen=True)
class Done:
    """Answer number ``index`` is complete."""

    index: int
    reason: Literal["stop", "length", "tool_calls"]
    finished: Finished


Event: TypeAlias = "Waiting | Said | Done"


class Answers:
    """The answers to ``plans`` (``number`` of them), which are submitted at once: QueueFullError, and ApiError for more than can
    ever wait, are raised here, before anything was sent.

    ``batches`` is iterated over once. ``cancel`` ends all of them; it may be called at any time.
    """

    def __init__(self, service: Service, plans: Sequence[Plan]) -> None:
        self.status = "queued, next"
        self._plans = plans
        self._log = service.log_texts
        self._tickets: list[Ticket] = []
        if len(plans) > service.options.queue:  # trying again would not help
            raise ApiError(
                f"this asks for {len(plans)} texts, and the server's queue holds {service.options.queue} (--queue)",
                "n",
                "invalid_value",
            )
        try:
            for plan in plans:
                self._tickets.append(service.scheduler.submit(plan.request))
        except Exception:
            self.cancel()
            raise

    @property
    def number(self) -> int:
        return len(self._tickets)

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    def batches(self) -> AsyncIterator[list[Event]]:
        """What the answers say, in the order in which it is said; each item is what there is to say at once. Raises ApiError where
        one of them fails."""
        streams = [self._one(index) for index in range(self.number)]
        return streams[0] if self.number == 1 else _merge(streams)

    async def _one(self, index: int) -> AsyncIterator[list[Event]]:
        ticket = self._tickets[index]
        speech = _Speech(self._plans[index], index, ticket.cancel, self._log)
        try:
            async for events in ticket:
                batch: list[Event] = []
                for event in events:
                    if isinstance(event, Queued | Reading):
                        if (status := _status(event)) != self.status:
                            self.status = status
                            batch.append(Waiting(status))
                    elif isinstance(event, Piece):
                        self.status = "writing"
                        batch += speech.goes_on(event)
                    else:
                        batch += speech.ends(event)
                if batch:
                    yield batch
                if speech.failure is not None:
                    raise speech.failure
        finally:
            ticket.cancel()


class _Speech:
    """Makes the pieces of answer number ``index`` what it says. ``enough`` is called when it is complete before the model ends;
    ``failure`` is why it will not be."""

    def __init__(self, plan: Plan, index: int, enough: Callable[[], None], log: Callable[[Request, str], None] | None) -> None:
        self.failure: ApiError | None = None
        self._plan, self._index, self._enough, self._log = plan, index, enough, log
        self._reader, self._calls, self._is_complete = plan.reader(), 0, False
        self._texts: list[str] = []  # for the log

    def goes_on(self, piece: Piece) -> Iterator[Said]:
        if self._is_complete:
            return
        if self._log is not None:
            self._texts.append(piece.text)
        deltas = self._reader.feed(piece.text)
        if self._plan.single_call and (found := _end_of_first_call(deltas, self._calls)) is not None:
            deltas, self._is_complete = deltas[:found], True
            self._enough()
        if deltas or piece.tokens:
            yield self._said(deltas, piece.tokens)

    def ends(self, end: Finished) -> Iterator[Said | Done]:
        if self._log is not None:
            self._log(self._plan.request, "".join(self._texts))
        if end.reason == "error":
            self.failure = ApiError(f"generating failed: {end.message}", status=500, code="generation_failed")
        elif end.reason == "cancelled" and not self._is_complete:
            self.failure = ApiError("the server is shutting down", status=503, code="shutting_down")
        else:
            if not self._is_complete and (deltas := self._reader.finish()):
                yield self._said(deltas)
            reason: Literal["stop", "length"] = "length" if end.reason == "length" else "stop"
            yield Done(self._index, "tool_calls" if self._calls and reason == "stop" else reason, end)

    def _said(self, deltas: Sequence[Delta], tokens: Sequence[TokenRecord] = ()) -> Said:
        self._calls += sum(isinstance(delta, ToolOpened) for delta in deltas)
        return Said(self._index, deltas, tokens)


def _status(event: Queued | Reading) -> str:
    if isinstance(event, Reading):
        return f"reading the prompt, {event.done} of {event.total} tokens"
    return f"queued, {event.position} ahead" if event.position else "queued, next"


def _end_of_first_call(deltas: Sequence[Delta], calls: int) -> int | None:
    """How many of ``deltas`` belong to the answer up to the end of its first call; None: it goes on."""
    for at, delta in enumerate(deltas):
        if isinstance(delta, ToolOpened):
            calls += 1
        if calls > 1 or (calls == 1 and isinstance(delta, Text) and not delta.text.isspace()):
            return at
    return None


async def _merge(streams: Sequence[AsyncIterator[list[Event]]]) -> AsyncIterator[list[Event]]:
    """The batches of all ``streams`` as they come."""
    queue: asyncio.Queue[list[Event] | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[list[Event]]) -> None:
        try:
            async for batch in stream:
                queue.put_nowait(batch)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            batch = await queue.get()
            if isinstance(batch, Exception):
                raise batch
            if batch is None:
                left -= 1
            else:
                yield batch
    finally:
        for task in tasks:
            task.cancel()


@dataclass
class Call:
    """A call of a tool; ``arguments`` are JSON."""

    id: str
    name: str
    arguments: str = ""


class Answer:
    """An answer that is whole: what a client that does not stream gets."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.calls: list[Call] = []
        self.tokens: list[TokenRecord] = []
        self.done: Done | None = None

    def add(self, said: Said) -> None:
        self.tokens += said.tokens
        for delta in said.deltas:
            if isinstance(delta, Text):
                self.text += delta.text
            elif isinstance(delta, Reasoning):
                self.reasoning += delta.text
            elif isinstance(delta, ToolOpened):
                self.calls.append(Call(delta.id, delta.name))
            elif isinstance(delta, ToolArguments):
                self.calls[delta.index].arguments += delta.text

    @property
    def end(self) -> Done:
        assert self.done is not None
        return self.done


async def collect(request: HttpRequest, answers: Answers) -> list[Answer]:
    """All of ``answers``, whole. Raises what ``collected`` raises."""
    whole: dict[int, Answer] = {}
    async for event in collected(request, answers):
        if isinstance(event, Said):
            whole.setdefault(event.index, Answer()).add(event)
        elif isinstance(event, Done):
            whole.setdefault(event.index, Answer()).done = event
    return [whole[index] for index in sorted(whole)]


async def collected(request: HttpRequest, answers: Answers) -> AsyncIterator[Event]:
    """The events of ``answers`` for a client that does not stream. Raises ClientGoneError, and ends the work, as soon as the
    client of ``request`` leaves."""
    async with _ended_by_disconnect(request, answers) as is_gone:
        try:
            async for batch in answers.batches():
                for event in batch:
                    yield event
        except ApiError:
            if is_gone():
                raise ClientGoneError from None
            raise


@asynccontextmanager
async def _ended_by_disconnect(request: HttpRequest, answers: Answers) -> AsyncIterator[Callable[[], bool]]:
    """Meanwhile a client that leaves cancels ``answers``."""
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        answers.cancel()

    task = asyncio.create_task(watch())
    try:
        yield lambda: gone
    finally:
        task.cancel()


def now() -> int:
    """Seconds since 1970, as the APIs stamp their answers."""
    return int(time.time())
