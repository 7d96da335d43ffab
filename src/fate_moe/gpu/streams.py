"""A lane of work on the device: the current stream, or a stream beside it. On a CPU there is one order of things, and a lane is
nothing."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

__all__ = ["Lane"]


class Lane:
    """``with lane:`` enqueues on it. ``a.follow(b)``: what is enqueued on a from now on waits for what is on b now.

    The main lane is whatever stream is current at each call, so that a capture may bring its own; side lanes join a capture by
    following it, and must be followed in turn before it ends.
    """

    def __init__(self, device: torch.device, side: bool) -> None:
        self._cuda = device.type == "cuda"
        # torch hands out 32 streams of each priority in turn: of the same one as the main lane's, a side lane may be the main lane.
        self._own: Any = torch.cuda.Stream(device, priority=-1) if self._cuda and side else None  # type: ignore[no-untyped-call]
        self._entered: Any = None

    @property
    def stream(self) -> Any:
        """The CUDA stream this lane is on now."""
        return self._own if self._own is not None else torch.cuda.current_stream()

    def follow(self, other: Lane) -> None:
        if self._cuda:
            self.stream.wait_stream(other.stream)

    def mark(self) -> Any:
        """What is on this lane now, for ``wait``."""
        return self.stream.record_event() if self._cuda else None

    def wait(self, mark: Any) -> None:
        """What is enqueued from now on waits for ``mark`` (None: for nothing)."""
        if mark is not None:
            self.stream.wait_event(mark)

    def synchronize(self) -> None:
        """Let the host wait for all that is on this lane."""
        if self._cuda:
            self.stream.synchronize()

    def __enter__(self) -> Lane:
        if self._own is not None:
            self._entered = torch.cuda.stream(self._own)
            self._entered.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._entered is not None:
            self._entered.__exit__(kind, error, trace)
            self._entered = None
