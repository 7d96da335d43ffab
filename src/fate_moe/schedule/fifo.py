"""The first scheduler: one inference thread, first come first served, a bounded queue."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from fate_moe.errors import FateError
from fate_moe.schedule.generation import CancelledError, Generation
from fate_moe.schedule.request import Event, Finished, Queued, Request, Usage
from fate_moe.schedule.scheduler import QueueFullError, Scheduler, StoppedError

__all__ = ["FifoScheduler"]

_log = logging.getLogger(__name__)


class _Ticket:
    """A request, the loop that waits for its events, and whether it is to go on."""

    def __init__(self, request: Request, on_cancel: Callable[[], None]) -> None:
        self.request, self.submitted, self._on_cancel = request, time.perf_counter(), on_cancel
        self.is_cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._is_called = False  # the loop was called, and has not looked yet

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self._on_cancel()

    def deliver(self, event: Event) -> None:
        """From any thread. A loop that was closed wants no events."""
        self._events.append(event)
        if self._is_called:
            return
        self._is_called = True
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:
            self.is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            self._is_called = False  # before the events are taken: of one that comes now, the loop hears again
            events = [self._events.popleft() for _ in range(len(self._events))]
            if events:
                yield events
                if isinstance(events[-1], Finished):
                    return


class FifoScheduler(Scheduler):
    """Runs ``model.generate()`` for one request after the other, in a thread of its own, which also loads the model.

    ``load`` gives (model, tokenizer); ``on_loaded`` is called with them, or with the error, in that thread. At most ``capacity``
    requests wait. ``on_finished`` is told of each request that ended, in the inference thread. A request that fails ends with
    ``Finished("error")``; the thread goes on.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        capacity: int = 64,
        on_loaded: Callable[[tuple[Any, Any] | Exception], None] = lambda result: None,
        on_finished: Callable[[Request, Finished], None] = lambda request, finished: None,
    ) -> None:
        self.capacity = capacity
        self._load, self._on_loaded, self._on_finished = load, on_loaded, on_finished
        self._waiting: deque[_Ticket] = deque()
        self._current: _Ticket | None = None
        self._generation: Generation | None = None
        self._generated = 0  # tokens of requests that ended
        self._changed = threading.Condition()  # reentrant: ending a request may cancel another
        self._is_closed = self._is_loaded = False
        self._thread = threading.Thread(target=self._run, name="fate-inference", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return int(self._current is not None)

    @property
    def generated_tokens(self) -> int:
        """Tokens that were generated so far, those of the running request among them."""
        generation = self._generation
        return self._generated + (generation.tokens if generation is not None else 0)

    def submit(self, request: Request) -> _Ticket:
        ticket = _Ticket(request, self._end_cancelled)
        with self._changed:
            if self._is_closed:
                raise StoppedError("the server is shutting down")
            self._drop_cancelled()
            if len(self._waiting) >= self.capacity:
                raise QueueFullError(f"{self.capacity} requests wait already; try again later")
            self._waiting.append(ticket)
            ticket.deliver(Queued(len(self._waiting) - 1 + self.running))
            self._changed.notify_all()
        return ticket

    def _end_cancelled(self) -> None:
        """What was cancelled while it waited ends now, not when its turn comes."""
        with self._changed:
            self._drop_cancelled()

    def close(self, drain_seconds: float = 0.0) -> None:
        deadline = time.monotonic() + drain_seconds
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and self._current is None, max(0.0, deadline - time.monotonic()))
            for left in (*self._waiting, *([self._current] if self._current else [])):
                left.cancel()
            self._drop_cancelled()
            self._changed.notify_all()
        if self._is_loaded:  # loading cannot be told to stop; the thread ends with the process
            self._thread.join()

    def _drop_cancelled(self) -> None:
        """Under the lock: end waiting requests that were cancelled, and tell the others where they stand."""
        if not any(ticket.is_cancelled for ticket in self._waiting):
            return
        gone = [ticket for ticket in self._waiting if ticket.is_cancelled]
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)
        for ticket in gone:
            self._end(ticket, Finished("cancelled", Usage(len(ticket.request.prompt), 0)))
        self._tell_positions()

    def _tell_positions(self) -> None:
        for ahead, ticket in enumerate(self._waiting, self.running):
            ticket.deliver(Queued(ahead))

    def _end(self, ticket: _Ticket, finished: Finished) -> None:
        self._on_finished(ticket.request, finished)
        ticket.deliver(finished)

    def _run(self) -> None:
        try:
            loaded = self._load()
            self._is_loaded = True
            self._on_loaded(loaded)
        except Exception as error:
            self._on_loaded(error)
            with self._changed:
                self._is_closed = True
                for left in self._waiting:
                    self._end(left, Finished("error", Usage(len(left.request.prompt), 0), message=str(error)))
                self._waiting.clear()
            return
        while (ticket := self._next()) is not None:
            finished = self._serve(ticket, *loaded)
            with self._changed:
                self._current = None
                self._end(ticket, finished)
                self._changed.notify_all()

    def _next(self) -> _Ticket | None:
        """The request whose turn it is; None once closed and empty."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._waiting:
                    self._current = self._waiting.popleft()
                    self._tell_positions()
                    return self._current
                if self._is_closed:
                    return None
                self._changed.wait()

    def _serve(self, ticket: _Ticket, model: Any, tokenizer: Any) -> Finished:
        request = ticket.request
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
        generation = Generation(model, tokenizer, request, ticket.deliver, lambda: ticket.is_cancelled, ticket.submitted)
        self._generation = generation
        try:
            return generation.run(seed)
        except CancelledError:
            return generation.finished("cancelled")
        except FateError as error:
            return generation.finished("error", str(error))
        except BaseException as error:  # a panic of a library in Rust is no Exception; the thread outlives it
            _log.exception("a request failed")
            return generation.finished("error", f"{type(error).__name__}: {error}")
        finally:
            self._generation = None
            self._generated += generation.tokens
