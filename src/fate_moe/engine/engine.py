"""What runs a model: ``model.fate``. One protocol; ``engine/cpu.py`` and ``engine/cuda.py`` implement it."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fate_moe.config import OffloadConfig
from fate_moe.core import Counters
from fate_moe.engine.budget import Plan
from fate_moe.engine.calls import Calls
from fate_moe.engine.device_budget import DevicePlan
from fate_moe.engine.patches import Patches
from fate_moe.engine.report import Report
from fate_moe.errors import ClosedModelError

if TYPE_CHECKING:
    from fate_moe.engine.activity import Activity
    from fate_moe.journal import Observer

__all__ = ["Engine", "collect_lost_engines"]

_log = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds, at the end of the program, for the pass that a daemon thread runs


@runtime_checkable
class Engine(Protocol):
    """Owns what a model runs on: its plan, weights, expert slots, threads and every change made to the model.

    ``plan`` says where the budget went, ``config`` how the model was asked to run, ``patches`` what was changed in it. Calls from
    several threads take turns (``calls``). ``counters``, ``report`` and ``observe`` may be called from any thread at any time,
    the first two after ``close`` too. As a context manager an engine closes itself; so it does when the model is deleted, and when
    the program ends:

    >>> with model.fate:
    ...     model.generate(**inputs)
    """

    plan: Plan | DevicePlan
    config: OffloadConfig
    patches: Patches
    model: Any
    calls: Calls
    assistant: Any = None  # a small model that drafts for this one (schedule/assistant.py)
    _end: weakref.finalize[..., Any]
    _ended: bool = False

    @abstractmethod
    def counters(self) -> Counters:
        """A copy of ``report().experts``, without what takes time: the system is not asked for memory."""

    @abstractmethod
    def report(self) -> Report:
        """Everything since loading: lookups, bytes, stall seconds, memory."""

    @abstractmethod
    def observe(self, observer: Observer) -> AbstractContextManager[None]:
        """Meanwhile ``observer`` is told of every pass, after it ran. Observing does not change the path that a pass takes.

        Raises ConfigError where this engine cannot be observed, or while another observer is.
        """

    def activity(self) -> Activity | None:
        """Looks at this engine from another thread while it runs; None where single experts cannot be seen."""
        return None

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self.calls.closed

    def end_with(self, runs: Any, stop: Callable[[], None], keep_learned: Callable[[], None]) -> None:
        """Called by ``__init__``: when the engine ends, call ``stop`` (threads, files, slots), then ``keep_learned``, once.

        It ends by ``close``, with the program, or when ``runs``, the object that runs the experts, is garbage; so neither function
        may refer to ``runs``.
        """
        self._end = weakref.finalize(runs, _end, stop, keep_learned, os.getpid())
        self._end.atexit = False  # _close_all does it, with the turn
        _open.add(self)

    def note_model(self) -> None:
        """Called by ``build`` after its last change to what the model computes: later changes are the user's."""
        return

    def keep_report(self) -> None:
        """Called by ``close`` before the engine ends: keep what ``report`` could not read afterwards."""
        return

    def close(self) -> None:
        """Stop, and undo every change to the model, which raises ClosedModelError from then on. May be called again.

        A pass that another thread runs is awaited; the ``generate`` that it belongs to raises ClosedModelError at its next one.
        """
        self.calls.closed = True  # the next pass of a generate that is under way raises
        if self.calls.is_forked:  # whose turn it is, is known to threads of the parent
            self._undo()
            return
        with self.calls.passing:
            self._undo()

    def _undo(self) -> None:
        if self._ended:
            return
        self._ended = True
        _open.discard(self)
        try:
            if not self.calls.is_forked:
                self.keep_report()
                self._end()
        finally:
            self.patches.undo(_refuse)
            for module in self.model.modules():
                self.patches.replace(module, "forward", _refuse)
            for name in ("generate", "save_pretrained", "push_to_hub", "state_dict"):
                self.patches.replace(self.model, name, _refuse)
            self.patches.replace(self.model, "fate", self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise ClosedModelError


_open: weakref.WeakSet[Engine] = weakref.WeakSet()  # engines that nobody closed


def collect_lost_engines() -> None:
    """End engines whose models were dropped without ``close``, whatever their memory is needed for next."""
    if _open:
        gc.collect()


def _end(stop: Callable[[], None], keep_learned: Callable[[], None], process: int) -> None:
    """Not in a child that was forked after loading: its threads are not here, and the parent learns."""
    if process != os.getpid():
        return

    def end() -> None:
        try:
            stop()
        finally:
            keep_learned()

    if threading.current_thread().name.startswith("fate-"):  # the garbage collector runs in any thread: this may be one to join
        threading.Thread(target=end).start()
    else:
        end()


@atexit.register
def _close_all() -> None:
    """At the end of the program: threads end and what was learned is kept.

    The turns are kept too, so that a daemon thread that calls a model does not meet a closed one: it waits until the process ends.
    """
    for engine in list(_open):
        if not engine.calls.is_forked and engine.calls.passing.acquire(_PATIENCE):
            try:
                engine._end()
            except Exception as error:
                _log.warning("closing a model at the end of the program failed: %s", error)
