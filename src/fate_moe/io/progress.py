"""Progress bars on stderr, shown only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Advance", "count_bar", "progress_bar"]


class Advance(Protocol):
    """Advances the bar by ``num_bytes``; ``remark`` is shown beside it."""

    def __call__(self, num_bytes: int, remark: str = "") -> None: ...


@contextmanager
def progress_bar(what: str, total_bytes: int, show: bool | None) -> Iterator[Advance]:
    """A bar for the duration of the block; ``show`` None: if stderr is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[remark]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total_bytes, remark="")

        def advance(num_bytes: int, remark: str = "") -> None:
            bar.update(task, advance=num_bytes, remark=remark)

        yield advance


@contextmanager
def count_bar(what: str, total: int, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """As ``progress_bar``, for a number of items instead of bytes."""
    if not (sys.stderr.isatty() if show is None else show):
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda number: bar.update(task, advance=number)


def _ignore(num_bytes: int, remark: str = "") -> None:
    pass
