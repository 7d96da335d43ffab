"""Whose turn it is: a model serves one call at a time, and threads wait for theirs."""

from __future__ import annotations

import os
import threading
from types import TracebackType

from fate_moe.errors import UnsupportedCallError

__all__ = ["Turn"]


class _Waiting:
    """Which thread waits for which turn, in the whole process; ``changed`` is notified when one ends."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # re-entrant: the garbage collector may close a model at any line
        self.of: dict[int, Turn] = {}  # by thread


_waiting = _Waiting()
if hasattr(os, "register_at_fork"):  # a child's only thread must not find the lock of one that stayed behind
    os.register_at_fork(after_in_child=_waiting.__init__)  # type: ignore[misc]


class Turn:
    """A re-entrant lock, for ``with``; who came first is next. Raises UnsupportedCallError where waiting would never end.

    That is when the thread that has it waits, itself or through others, for a turn of the thread that asks: model A called within
    a call of B, and at the same time B within one of A.
    """

    def __init__(self) -> None:
        self._owner: int | None = None  # a thread
        self._depth = 0
        self._line: list[int] = []  # threads that wait

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for the turn, at most ``timeout`` seconds; whether it is the calling thread's now."""
        me, changed = threading.get_ident(), _waiting.changed
        mine = False
        try:
            with changed:
                if self._owner != me and (self._owner is not None or self._line) and not self._wait(me, timeout):
                    return False
                self._owner, mine = me, True
                self._depth += 1
        except BaseException:  # Ctrl-C on the way out
            if mine:
                self.release()
            raise
        return True

    def release(self) -> None:
        """End what one ``acquire`` began."""
        with _waiting.changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                _waiting.changed.notify_all()

    def _wait(self, me: int, timeout: float | None) -> bool:
        if self._is_behind(me):
            raise UnsupportedCallError(
                "two threads call two models, each within a call of the other, and would wait for ever; call one after the other"
            )
        self._line.append(me)
        _waiting.of[me] = self
        try:
            while self._owner is not None or self._line[0] != me:
                if not _waiting.changed.wait(timeout):
                    return False
            return True
        finally:
            self._line.remove(me)
            del _waiting.of[me]
            _waiting.changed.notify_all()

    def _is_behind(self, thread: int) -> bool:
        """Whether this turn ends only after one of ``thread``'s."""
        turn: Turn | None = self
        while turn is not None and turn._owner is not None:
            if turn._owner == thread:
                return True
            turn = _waiting.of.get(turn._owner)
        return False
