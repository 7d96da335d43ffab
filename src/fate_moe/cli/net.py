"""The outer net around every verb: whatever is raised becomes one line and an exit code, and the process ends quietly. No torch."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from fate_moe.errors import FateError

__all__ = ["CLOSED_PIPE", "INTERRUPTED", "Net", "one_line", "open_closed_streams", "say", "uninterrupted"]

INTERRUPTED, CLOSED_PIPE = 130, 141  # what a shell calls the ends by SIGINT and SIGPIPE
_LONGEST_LINE = 2000  # characters of a message: a library may quote a whole file

# What to do about errors of the operating system, by number.
_REMEDIES = {
    errno.ENOSPC: "free some space, or name another disk",
    errno.EDQUOT: "free some of your quota, or name another disk",
    errno.EFBIG: "the limit on file sizes is too small (ulimit -f)",
    errno.EACCES: "check its permissions, or name another place",
    errno.EPERM: "check its permissions, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the network disk again",
    errno.ENOMEM: "give a smaller --ram or a shorter --context-length, or stop other programs",
    errno.EAGAIN: "allow more processes and threads (ulimit -u)",
}
_NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "cannot allocate memory", "unable to allocate")


class Net:
    """What ``main`` runs in. ``code`` is the exit code once the block is left; of errors, only SystemExit passes through.

    ``as_command``: the process ends after the block, so what keeps its end quiet stays in force.
    """

    def __init__(self, as_command: bool) -> None:
        self.code = 0
        self._verbose = 0
        self._as_command = as_command
        self._undo = ExitStack()

    def __enter__(self) -> Net:
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            if number is not None and threading.current_thread() is threading.main_thread():
                before = signal.getsignal(number)
                if before != signal.SIG_IGN:  # nohup
                    signal.signal(number, _stop)
                    self._undo.callback(signal.signal, number, before)
        return self

    def start(self, verbose: int, level: int) -> None:
        """Log messages of this package from ``level`` on, and let others' warnings through with ``verbose`` alone."""
        self._verbose = verbose
        self._undo.enter_context(_logging(level))
        if level <= logging.INFO:
            return
        self._undo.enter_context(_no_warnings())
        if self._as_command:
            sys.unraisablehook = lambda unraisable: None
            threading.excepthook = lambda raised: None  # what a thread needs to say, it hands to the one that waits for it

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        passes = isinstance(error, SystemExit) and not isinstance(error.code, str)
        try:
            if error is not None and not passes:
                self.code = self._say(error)
            if (late := _unwritten()) is not None:
                self.code = self.code or self._say(late)
                passes = False
        finally:
            if self._as_command and threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)  # nothing is left to be kept: a second Ctrl-C ends at once
            else:
                self._undo.close()
        return not passes

    def _say(self, error: BaseException) -> int:
        """Print the line for ``error``; returns its exit code."""
        chain = list(_chain(error))
        if any(isinstance(one, KeyboardInterrupt) for one in chain):  # libraries wrap what interrupts their import
            return INTERRUPTED
        for one in chain:
            if isinstance(one, SystemExit) and isinstance(one.code, int) and one.code > 128:
                return one.code  # a signal, met while something else was handled
        if isinstance(error, BrokenPipeError):  # `fate run | head`
            return CLOSED_PIPE
        if self._verbose > 1:
            with suppress(OSError, ValueError):
                traceback.print_exception(error)
        say(f"fate: {one_line(_sentence(error))}")
        return 1


def say(text: str) -> None:
    """A line on standard error, if anybody reads that."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """``text`` without line ends and control characters, so that names of files and words of libraries stay one line."""
    line = " ".join(text.split())
    line = "".join("\ufffd" if unicodedata.category(character) == "Cc" else character for character in line)
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + " ..."


def open_closed_streams(as_command: bool) -> None:
    """Give stdin, stdout and stderr something to stand for where the caller closed them: print() would write to the other one, and
    the next file to be opened would take their place. Text that has no place in the terminal's encoding is printed with
    replacements. ``as_command``: standard output becomes one whose errors name it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # stays open
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    out = sys.stdout
    if as_command and isinstance(out, io.TextIOWrapper):
        buffer = io.BufferedWriter(_Output(out.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(buffer, out.encoding, "replace", None, out.line_buffering, out.write_through)


@contextmanager
def uninterrupted(close: Callable[[], Any]) -> Iterator[None]:
    """Call ``close`` when the block is left; meanwhile another Ctrl-C or SIGTERM waits, so that what was learned is kept."""
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        else:
            before = {}
        try:
            close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """A signal ends the command as an exception does: files are removed, threads end, what was learned is kept."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _sentence(error: BaseException) -> str:
    """What went wrong and what to do about it."""
    text = str(error).strip()
    if isinstance(error, FateError):
        return text
    if isinstance(error, SystemExit):
        return text
    if isinstance(error, OSError) and error.errno is not None:
        remedy = _REMEDIES.get(error.errno)
        where = "the system" if error.filename is None else error.filename
        where = os.fsdecode(where) if isinstance(where, bytes) else where
        return f"{where}: {error.strerror or text}" + (f"; {remedy}" if remedy else "")
    kind = type(error).__name__
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _NO_MEMORY):
        return f"memory ran out ({_first(text) or kind}); {_REMEDIES[errno.ENOMEM]}"
    if isinstance(error, RecursionError):
        return f"something that was read is nested too deeply ({_first(text)}); check the files that were given"
    if "start new thread" in text:
        return f"{text}: the system allows no more; allow more (ulimit -u), or close other programs"
    if isinstance(error, ImportError):
        again = f"pip install --force-reinstall {(error.name or 'fate-moe').partition('.')[0]}"
        return f"{_first(text)}; a package is missing or broken, install it again: {again}"
    return f"{kind}: {_first(text) or 'no reason given'}; this error is not known, the same with -vv shows where it comes from"


def _first(text: str) -> str:
    return text.splitlines()[0] if text else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


class _Output(io.FileIO):
    """Standard output, whose errors name it; the last one is remembered, because argparse and libraries drop it."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            self.failed = OSError(error.errno, error.strerror, error.filename)  # without the frames of whoever wrote
            raise


def _unwritten() -> OSError | None:
    """Why standard output could not be written, if it could not; what it still holds is dropped, so that the interpreter's own
    flush does not complain of it."""
    error: OSError | None = None
    try:
        sys.stdout.flush()
    except OSError as met:
        error = met
    except ValueError:  # closed by a library
        return None
    error = error or getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failed", None)
    if error is not None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return error


class _OnStderr(logging.StreamHandler[Any]):
    """Messages on standard error; where nobody reads that, they are dropped."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        pass


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """This package's messages from ``level`` on; those of other libraries only where ours of the level INFO are shown."""
    handler, nothing = _OnStderr(sys.stderr), logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours, root = logging.getLogger("fate_moe"), logging.getLogger()
    holder, before = (root if level <= logging.INFO else ours), ours.level
    holder.addHandler(handler)
    root.addHandler(nothing)  # without any handler, logging prints warnings itself
    ours.setLevel(level)
    try:
        yield
    finally:
        holder.removeHandler(handler)
        root.removeHandler(nothing)
        ours.setLevel(before)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """No warnings of Python and of libraries, unless the interpreter was asked for them (-W, PYTHONWARNINGS)."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            ours = [entry for entry in warnings.filters if entry[2] is ResourceWarning]
            warnings.simplefilter("ignore")
            warnings.filters[:0] = ours  # type: ignore[index]
        yield
