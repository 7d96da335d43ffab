"""What a scheduler does: requests go in, events come out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from fate_moe.core import Drafts
from fate_moe.engine.report import PrefixReport
from fate_moe.errors import FateError
from fate_moe.schedule.request import Event, Request

__all__ = ["Load", "QueueFullError", "Scheduler", "StoppedError", "Ticket"]


class QueueFullError(FateError):
    """As many requests wait as may wait. Those that wait now should have begun in ``retry_seconds``."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class StoppedError(FateError):
    """The scheduler takes no more requests: it is shutting down."""


@dataclass(frozen=True)
class Load:
    """Since the scheduler was started: steps, their rows, and how often a request gave its blocks of the KV cache to others.
    ``blocks_used`` of ``blocks`` are taken now, ``blocks_kept`` of these by what ended, of which ``prefixes`` tells the use;
    ``drafts`` are the model's."""

    steps: int = 0
    rows: int = 0
    preemptions: int = 0
    blocks_used: int = 0
    blocks: int = 0
    blocks_kept: int = 0
    drafts: Drafts = field(default_factory=Drafts)
    prefixes: PrefixReport = field(default_factory=PrefixReport)


class Ticket(Protocol):
    """One submitted request. Iterate over it once, in the event loop that submitted it: each item is a list of the events that came
    since the one before, in order. ``Finished`` is the last event, and it always comes.

    ``cancel`` ends the request within one token, also while it waits or its prompt is read; ``Finished("cancelled")`` follows. It
    may be called from any thread, again, and after the end.
    """

    def __aiter__(self) -> AsyncIterator[list[Event]]: ...

    def cancel(self) -> None: ...


class Scheduler(Protocol):
    """Serves requests in an order that starves none. A request's text depends on the request alone, not on others beside it.

    ``waiting`` and ``running`` count requests, ``generated_tokens`` all tokens so far; ``load`` is for metrics. ``submit`` is
    called in an event loop, returns at once, and raises QueueFullError or StoppedError. ``close`` takes no more requests, lets
    those that were taken end for ``drain_seconds``, cancels the others and returns when nothing runs; it blocks.
    """

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def generated_tokens(self) -> int: ...

    @property
    def load(self) -> Load: ...

    def submit(self, request: Request) -> Ticket: ...

    def close(self, drain_seconds: float = 0.0) -> None: ...
