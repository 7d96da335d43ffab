"""The way of a request's events from the inference thread to the event loop that asked."""

from __future__ import annotations

import asyncio
import ctypes
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable

from fate_moe.schedule.request import Event, Finished

__all__ = ["Bell", "QueueTicket"]

# As a function of Python's own library it is called with the interpreter held. os.eventfd_write and socket.send, by which asyncio
# wakes a loop, let go of it, and the loop takes it: the inference thread would stand still while the loop writes an answer.
_eventfd_write = ctypes.PyDLL(None).eventfd_write
_eventfd_write.argtypes = (ctypes.c_int, ctypes.c_uint64)
_bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell] = weakref.WeakKeyDictionary()


class Bell:
    """Wakes one event loop, once for all tickets that have something to tell. The loop runs as soon as the caller of ``ring`` lets
    go of the interpreter: best rung when a long call of the extension is about to begin."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._due: deque[QueueTicket] = deque()
        self._number = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._number)
        loop.add_reader(self._number, self._rung)

    @classmethod
    def here(cls) -> Bell:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if (bell := _bells.get(loop)) is None:
            bell = _bells[loop] = cls(loop)
        return bell

    @property
    def is_closed(self) -> bool:
        """Whether the loop has ended."""
        loop = self._loop()
        return loop is None or loop.is_closed()

    def later(self, ticket: QueueTicket) -> None:
        """From any thread: the next ``ring`` is for ``ticket`` too."""
        self._due.append(ticket)

    def ring(self) -> None:
        """From any thread. A loop that was closed wants no events: its requests are cancelled."""
        if not self._due:
            return
        if self.is_closed:
            while self._due:
                self._due.popleft().is_cancelled = True
        else:
            _eventfd_write(self._number, 1)

    def _rung(self) -> None:
        os.eventfd_read(self._number)
        while self._due:
            self._due.popleft().arrived.set()


class QueueTicket:
    """The loop that waits for a request's events, and whether the request is to go on. ``on_cancel`` is called once."""

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
        self.is_cancelled = False
        self.bell = Bell.here()
        self.arrived = asyncio.Event()
        self._events: deque[Event] = deque()
        self._is_due = False  # the bell knows, and the loop has not looked yet

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self._on_cancel()

    def deliver(self, event: Event) -> None:
        """From any thread; the loop hears of it at the next ``bell.ring()``."""
        self._events.append(event)
        if not self._is_due:
            self._is_due = True
            self.bell.later(self)

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            self._is_due = False  # before the events are taken: of one that comes now, the loop hears again
            events = [self._events.popleft() for _ in range(len(self._events))]
            if events:
                yield events
                if isinstance(events[-1], Finished):
                    return
