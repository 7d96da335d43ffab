"""Devices that fail: delays, short reads, EIO, ENOSPC, EMFILE and signals under the reader and the writer, by probability."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

from fate_moe.checkpoints import source
from fate_moe.config import OffloadConfig
from fate_moe.core import ExpertId
from fate_moe.engine.load import build
from fate_moe.engine.prepare import prepare
from fate_moe.errors import CorruptExpertError, FateError
from fate_moe.io import digests, files
from fate_moe.store.convert import convert
from fate_moe.store.reader import DiskSource
from tests.support.engines import load_model
from tests.support.reading import snapshot
from tests.torture.case import Case, WrongError, refusal
from tests.torture.kills import REFUSED, child, ended
from tests.torture.material import generate, text_of

__all__ = ["Faults", "faulty_conversion", "faulty_run"]


class Faults:
    """While it is entered, calls of the operating system that this package makes fail or misbehave with ``probability`` each.

    ``counts`` says how often each did; only the thread limits of the case keep it from being deterministic.
    """

    def __init__(self, dice: Random, probability: float, counts: dict[str, int]) -> None:
        self._dice, self._probability, self.counts = dice, probability, counts
        self._undo = ExitStack()
        self.entered = False

    def __enter__(self) -> Faults:
        self.entered = True
        for owner, name, made in (
            (os, "preadv", self._preadv(os.preadv)),
            (os, "fsync", self._failing(os.fsync, (errno.EIO, errno.ENOSPC))),
            (os, "replace", self._failing(os.replace, (errno.EIO, errno.ENOSPC, errno.EDQUOT))),
            (os, "rename", self._failing(os.rename, (errno.EIO,))),
            (os, "open", self._failing(os.open, (errno.EIO, errno.EMFILE, errno.ENFILE), 0.3)),
            (files, "open", self._open),
            (source, "open", self._open),
            (digests, "open", self._open),
        ):
            self._replace(owner, name, made)
        return self

    def __exit__(self, *_: object) -> None:
        self.entered = False
        self._undo.close()

    def _replace(self, owner: Any, name: str, made: Any) -> None:
        had = name in vars(owner)
        before = getattr(owner, name, None)
        setattr(owner, name, made)
        self._undo.callback(lambda: setattr(owner, name, before) if had else delattr(owner, name))

    def hits(self, what: str, less: float = 1.0) -> bool:
        """Whether a fault happens now; counts it."""
        if self._dice.random() >= self._probability * less:
            return False
        self.counts[what] = self.counts.get(what, 0) + 1
        return True

    def fail(self, number: int) -> OSError:
        return OSError(number, os.strerror(number))

    def _failing(self, function: Callable[..., Any], numbers: tuple[int, ...], less: float = 1.0) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.hits("errors", less):
                raise self.fail(self._dice.choice(numbers))
            return function(*arguments, **options)

        return call

    def _preadv(self, function: Callable[..., int]) -> Callable[..., int]:
        def call(handle: int, buffers: list[memoryview], offset: int) -> int:
            if self.hits("delays", 0.5):
                time.sleep(self._dice.choice((0.001, 0.01, 0.05)))
            if self.hits("errors"):
                raise self.fail(errno.EIO)
            (buffer,) = buffers
            if len(buffer) > 1 and self.hits("short reads"):
                buffer = buffer[: max(1, len(buffer) * self._dice.randrange(8) // 8 // 512 * 512)]
            return function(handle, [buffer], offset)

        return call

    def _open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        if self.hits("errors", 0.3):
            raise self.fail(self._dice.choice((errno.EIO, errno.EMFILE)))
        if mode == "xb":
            return _Writer(io.FileIO(path, mode), self, self._dice)
        if mode == "rb":
            return _Reader(io.FileIO(path, mode), self, self._dice)
        return open(path, mode, **options)


class _Writer(io.BufferedWriter):
    """A disk that fills up, fails, or takes half of what it is given."""

    def __init__(self, raw: io.FileIO, faults: Faults, dice: Random) -> None:
        super().__init__(raw)
        self._faults, self._dice = faults, dice

    def write(self, data: Any) -> int:
        if self._faults.hits("errors", 0.5):
            with suppress(OSError):
                super().write(memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
            raise self._faults.fail(self._dice.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG)))
        return super().write(data)


class _Reader(io.BufferedReader):
    def __init__(self, raw: io.FileIO, faults: Faults, dice: Random) -> None:
        super().__init__(raw)
        self._faults, self._dice = faults, dice

    def readinto(self, buffer: Any) -> int:
        if self._faults.hits("delays", 0.2):
            time.sleep(self._dice.choice((0.001, 0.01)))
        if self._faults.hits("errors", 0.5):
            raise self._faults.fail(errno.EIO)
        return super().readinto(buffer)


@contextmanager
def _interrupted() -> Iterator[None]:
    """A signal every two milliseconds, with a handler: system calls return EINTR."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _with_few_handles(case: Case, action: Callable[[], object]) -> str:
    """In a child that may open only a few more files: it does what it should, or ends with one error."""
    case.kind += "few file handles"
    more = case.dice.randrange(8)

    def limited() -> None:
        most = max(map(int, os.listdir("/proc/self/fd"))) + 1 + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if refusal(action) is not None:
            raise FateError

    if (code := ended(child(limited))) not in (0, REFUSED):
        raise WrongError(f"with {more} more file handles the child ended with {code}")
    return "refused" if code else "right"


def _hostile(case: Case) -> Any:
    """One of the hostile surroundings; names it."""
    if case.dice.random() < 0.1:
        case.kind += "signals"
        return _interrupted()
    probability = 10 ** case.dice.uniform(-2.5, -0.7)
    case.kind += "faults" if "faults" not in case.kind else ""
    return Faults(case.dice, probability, case.counts)


def faulty_conversion(case: Case) -> str:
    """A conversion ends with the right store or one error, and the next one, undisturbed, ends with the right store."""
    case.kind = "conversion, "
    name = case.dice.choice(case.material.facts["stores"])
    family, precision = name.rsplit("-", 1)
    store, checkpoint = case.work / "store", case.material.home / "checkpoints" / family
    expected, refused = snapshot(case.material.home / "plain" / name), 0
    if case.dice.random() < 0.1:
        _with_few_handles(case, lambda: convert(checkpoint, store, precision))
    for _ in range(case.dice.randrange(1, 4)):
        with _hostile(case):
            refused += refusal(lambda: convert(checkpoint, store, precision)) is not None
        if store.exists() and snapshot(store) != expected:
            raise WrongError("there is another store, or half of one")
    convert(checkpoint, store, precision)
    if snapshot(store) != expected or list(case.work.glob("store.*")):
        raise WrongError(f"afterwards the store is another, or something is left: {sorted(p.name for p in case.work.iterdir())}")
    return "refused" if refused else "right"


def faulty_run(case: Case) -> str:
    """Loading and writing text: the right text or one error; afterwards the same model, or a new one, writes the right text."""
    case.kind = "a run, "
    name = case.dice.choice(case.material.facts["stores"])
    store, right = case.material.home / "stores" / name, case.material.facts["text"][name]
    if case.dice.random() < 0.1:
        return _with_few_handles(case, lambda: text_of(store))
    begun = _open_things()
    models: list[Any] = []
    options: dict[str, Any] = {"context_length": 32, "expert_cache": case.dice.choice(("20%", "35%", "100%"))}
    loads_well, refused = case.dice.random() < 0.6, 0
    surroundings = _hostile(case)
    if loads_well and case.dice.random() < 0.3 and isinstance(surroundings, Faults):
        case.kind += ", at the source"
        models.append(_with_source(store, surroundings, options))
    elif loads_well:
        models.append(load_model(store, **options))
    with surroundings:
        if not loads_well:
            refused += refusal(lambda: models.append(load_model(store, **options))) is not None
        for _ in range(case.dice.randrange(1, 4) if models else 0):
            text: list[list[int]] = []
            refused += refusal(lambda text=text: text.append(generate(models[0]))) is not None  # type: ignore[misc]
            if text and text[0] != right:
                raise WrongError(f"wrote {text[0]} instead of {right}")
    try:
        models = models or [load_model(store, **options)]
        models[0].fate.runtime.residency.wait_idle()  # reads that an abandoned pass began among the faults may still fail
        if (after := generate(models[0])) != right:
            raise WrongError(f"after the faults it wrote {after} instead of {right}")
    except FateError as error:
        raise WrongError(f"after the faults it does not go on: {error}") from error
    finally:
        for model in models:
            model.fate.close()
    models.clear()
    if (now := _open_things()) != begun:
        raise WrongError(f"open files and threads were {begun}, and are {now}")
    return "refused" if refused else "right"


class _Source:
    """The store's files as an ExpertSource, of which single experts cannot be read while ``faults`` is entered."""

    def __init__(self, inner: DiskSource, faults: Faults) -> None:
        self._inner, self._faults = inner, faults

    def read(self, expert: ExpertId, slot: memoryview, first: int = 0, last: int | None = None) -> int:
        """As core.ExpertSource."""
        if self._faults.entered and self._faults.hits("failed experts", 3):
            slot[: len(slot) // 2] = b"\xff" * (len(slot) // 2)
            raise CorruptExpertError(f"layer {expert.layer} expert {expert.expert} differs from its checksum")
        return self._inner.read(expert, slot, first, last)

    def close(self) -> None:
        """As core.ExpertSource."""
        self._inner.close()


def _with_source(store: Path, faults: Faults, options: dict[str, Any]) -> Any:
    config, prepared = OffloadConfig.from_options(options), prepare(store)
    return build(prepared, prepared.plan(config), config, source=_Source(DiskSource(prepared.store), faults))


def _open_things() -> tuple[list[str], int]:
    """What files of the stores are open, and how many threads run."""
    links = []
    for handle in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{handle}"))
    return sorted(Path(link).name for link in links if "store" in link), threading.active_count()
