"""The way of a request's events from the inference thread to the event loop that asked."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from fate_moe.schedule.request import Event, Finished

__all__ = ["QueueTicket"]


class QueueTicket:
    """The loop that waits for a request's events, and whether the request is to go on. ``on_cancel`` is called once."""

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
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
