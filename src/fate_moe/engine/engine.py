"""What runs a model: ``model.fate``. One protocol; ``engine/cpu.py`` and ``engine/cuda.py`` implement it."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fate_moe.config import OffloadConfig
from fate_moe.engine.budget import Plan
from fate_moe.engine.device_budget import DevicePlan
from fate_moe.engine.patches import Patches
from fate_moe.engine.report import Report
from fate_moe.errors import ClosedModelError

if TYPE_CHECKING:
    from fate_moe.engine.activity import Activity
    from fate_moe.journal import Observer

__all__ = ["Engine"]


@runtime_checkable
class Engine(Protocol):
    """Owns what a model runs on: its plan, weights, expert slots, threads and every change made to the model.

    ``plan`` says where the budget went, ``config`` how the model was asked to run, ``patches`` what was changed in it. One thread
    runs the model at a time; ``report`` may be called from any thread and at any time, also after ``close``. As a context manager
    an engine closes itself:

    >>> with model.fate:
    ...     model.generate(**inputs)
    """

    plan: Plan | DevicePlan
    config: OffloadConfig
    patches: Patches
    model: Any
    closed: bool = False

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

    @abstractmethod
    def stop(self) -> None:
        """Stop threads, close files, give slots back, keep what was learned. Called once, by ``close``."""

    def close(self) -> None:
        """Stop, and undo every change to the model, which raises ClosedModelError from then on. May be called again."""
        if self.closed:
            return
        self.closed = True
        try:
            self.stop()
        finally:
            self.patches.undo()
            for name in ("forward", "generate"):
                self.patches.replace(self.model, name, _refuse)
            self.patches.replace(self.model, "fate", self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise ClosedModelError
