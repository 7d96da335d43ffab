"""Processes that do cases one after the other. Each case has a time limit, and how a process ends is part of a case's outcome."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

from fate_moe.errors import FateError
from tests.torture.case import GOOD, Area, Case, Material, Outcome, WrongError

__all__ = ["do", "outcomes"]

_fork = multiprocessing.get_context("fork")
_MOST_ADDRESSES = 6 << 30  # beyond what a worker has mapped at its start; an allocation above it fails at once


def do(area: Area, seed: int, number: int, material: Material, folder: Path) -> Outcome:
    """Do one case here, in this process."""
    work = folder / f"{area.name}-{number}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    case = Case(number, Random(f"{seed}/{area.name}/{number}"), work, material)
    began, outcome, detail = time.perf_counter(), "foreign error", ""
    before = _start_peak()
    try:
        outcome = area.run(case)
        if outcome not in GOOD:
            outcome, detail = "wrong", f"the case returned {outcome!r}"
    except WrongError as error:
        outcome, detail = "wrong", str(error)
    except FateError as error:
        outcome, detail = "wrong", f"an error where none may be: {error}"
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)
        own = next((frame for frame in reversed(at) if "fate_moe" in frame.filename), at[-1])
        detail = f"{type(error).__name__}: {str(error)[:200]} ({Path(own.filename).name}:{own.lineno} in {own.name})"
        if "-v" in sys.argv:
            traceback.print_exc()
    grown = _peak() - before
    if grown > area.most_bytes and outcome in GOOD:
        outcome, detail = "memory", f"the process grew by {grown >> 20} MiB"
    shutil.rmtree(work, ignore_errors=True)
    gc.collect()
    seconds = time.perf_counter() - began
    return Outcome(area.name, number, case.kind, outcome, detail, seconds, grown, case.counts)


def outcomes(jobs: Iterator[tuple[Area, int]], seed: int, material: Material, folder: Path, num_workers: int) -> Iterator[Outcome]:
    """Do ``jobs``, each an area and a number, in so many processes at once, and yield how each ended."""
    workers = [_Worker(seed, material, folder / f"worker-{i}") for i in range(num_workers)]
    try:
        idle = list(workers)
        while True:
            while idle and (job := next(jobs, None)) is not None:
                idle.pop().give(*job)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            wait([worker.pipe for worker in busy], timeout=max(0.0, min(worker.deadline for worker in busy) - time.monotonic()))
            for worker in busy:
                if (outcome := worker.result()) is not None:
                    idle.append(worker)
                    yield outcome
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """The parent's side of one process; a new one takes its place when it crashes or hangs."""

    def __init__(self, seed: int, material: Material, folder: Path) -> None:
        self._seed, self._material, self._folder = seed, material, folder
        self.job: tuple[Area, int] | None = None
        self.deadline = 0.0
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = _fork.Pipe()
        self._process = _fork.Process(target=_serve, args=(theirs, self._seed, self._material, self._folder))
        self._process.start()
        theirs.close()

    def give(self, area: Area, number: int) -> None:
        self.job, self.deadline = (area, number), time.monotonic() + area.limit_seconds
        self.pipe.send((area, number))

    def result(self) -> Outcome | None:
        """How the job ended; None while it goes on."""
        assert self.job is not None
        (area, number), late = self.job, time.monotonic() > self.deadline
        if self.pipe.poll():
            try:
                outcome: Outcome = self.pipe.recv()
                self.job = None
                return outcome
            except EOFError:
                self._process.join()
                code = self._process.exitcode or 0
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return self._anew(Outcome(area.name, number, "", "crash", f"the process ended: {name}"))
        if late:
            return self._anew(
                Outcome(area.name, number, "", "hang", f"not done after {area.limit_seconds:.0f} s", area.limit_seconds)
            )
        return None

    def _anew(self, outcome: Outcome) -> Outcome:
        self.job = None
        self.stop()
        self._start()
        return outcome

    def stop(self) -> None:
        """End the process and all that it started."""
        if self._process.pid is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Connection, seed: int, material: Material, folder: Path) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit = _status("VmSize") + _MOST_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["FATE_HOME"] = str(folder / "fate-home")
    gc.freeze()  # a collection after each case looks at that case only
    while True:
        try:
            area, number = pipe.recv()
        except EOFError:
            return
        pipe.send(do(area, seed, number, material, folder))


def _start_peak() -> int:
    """Let the kernel's peak of resident memory begin anew; bytes that are resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return 0
