"""Several at once: processes on one store, conversions to one place, forks after loading, threads on one model, signals."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fate_moe.errors import ClosedModelError, UnsupportedCallError
from fate_moe.store.convert import convert
from tests.support.engines import load_model
from tests.support.reading import snapshot
from tests.torture.case import Case, WrongError
from tests.torture.kills import child, ended
from tests.torture.material import generate, text_of

__all__ = ["race"]

_OPTIONS: dict[str, Any] = {"context_length": 32, "expert_cache": "35%"}


def race(case: Case) -> str:
    """One of the ways in which several meet."""
    name = case.dice.choice(case.material.facts["stores"])
    way = case.dice.choice((_processes, _conversions, _fork_after_load, _threads, _signal_in_conversion, _signal_in_run))
    case.kind = way.__name__.strip("_").replace("_", " ")
    store = case.work / "store"
    if way not in (_conversions, _signal_in_conversion):
        shutil.copytree(case.material.home / "stores" / name, store)
    way(case, name, store)
    return "right"


def _wrong_unless(written: list[int], right: list[int], where: str) -> None:
    if written != right:
        raise WrongError(f"{where} wrote {written} instead of {right}")


def _processes(case: Case, name: str, store: Path) -> None:
    """Several processes load, write and keep what they learned at once."""
    right = case.material.facts["text"][name]

    def run() -> None:
        _wrong_unless(text_of(store), right, "a child")

    if any(codes := [ended(pid) for pid in [child(run) for _ in range(case.dice.randrange(2, 5))]]):
        raise WrongError(f"children ended with {codes}")
    _wrong_unless(text_of(store), right, "a run afterwards")


def _conversions(case: Case, name: str, store: Path) -> None:
    """Two or three convert to one place at once, and sometimes one of them is killed."""
    family, precision = name.rsplit("-", 1)
    pids = [
        child(lambda: convert(case.material.home / "checkpoints" / family, store, precision))
        for _ in range(case.dice.randrange(2, 4))
    ]
    killed = case.dice.random() < 0.5
    if killed:
        time.sleep(case.dice.uniform(0, 0.2))
        os.kill(pids[0], signal.SIGKILL)
        case.counts["kills"] = 1
    codes = [ended(pid) for pid in pids]
    if any(codes[1:] if killed else codes):
        raise WrongError(f"conversions ended with {codes}")
    if snapshot(store) != snapshot(case.material.home / "plain" / name) or list(case.work.glob("*.partial")):
        raise WrongError("the store is another, or a part is left")


def _fork_after_load(case: Case, name: str, store: Path) -> None:
    """A child that was forked after loading says so in one line, and can load for itself; the parent goes on."""
    right = case.material.facts["text"][name]
    model = load_model(store, **_OPTIONS)
    try:
        if case.dice.random() < 0.5:
            _wrong_unless(generate(model), right, "the parent")

        def use() -> None:
            with suppress(UnsupportedCallError):
                _wrong_unless(generate(model), right, "the child")
            if case.dice.random() < 0.5:
                model.fate.close()
            _wrong_unless(text_of(store), right, "the child's own model")

        pid = child(use)
        _wrong_unless(generate(model), right, "the parent, meanwhile")
        if code := ended(pid):
            raise WrongError(f"the child ended with {code}")
    finally:
        model.fate.close()


def _threads(case: Case, name: str, store: Path) -> None:
    """Threads share a model, and sometimes one closes it: the right text, or that it is closed."""
    right, model, wrong = case.material.facts["text"][name], load_model(store, **_OPTIONS), []
    closes = case.dice.random() < 0.5

    def use() -> None:
        try:
            for _ in range(3):
                _wrong_unless(generate(model), right, "a thread")
        except ClosedModelError:
            if not closes:
                wrong.append("closed by nobody")
        except BaseException as error:
            wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=use) for _ in range(case.dice.randrange(2, 5))]
    for thread in threads:
        thread.start()
    if closes:
        time.sleep(case.dice.uniform(0, 0.1))
        model.fate.close()
    for thread in threads:
        thread.join()
    model.fate.close()
    if wrong:
        raise WrongError("; ".join(wrong))


def _signalled(case: Case, action: Any, seconds: float) -> None:
    pid = child(action)
    time.sleep(case.dice.uniform(0, seconds))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)
    code = ended(pid)
    if code not in (0, 130):
        raise WrongError(f"after SIGINT the child ended with {code}")
    case.counts["signals"] = int(code == 130)


def _signal_in_conversion(case: Case, name: str, store: Path) -> None:
    """Ctrl-C in a conversion; the next one goes on."""
    family, precision = name.rsplit("-", 1)
    source = case.material.home / "checkpoints" / family

    def action() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        convert(source, store, precision)

    _signalled(case, action, 0.2)
    convert(source, store, precision)
    if snapshot(store) != snapshot(case.material.home / "plain" / name) or list(case.work.glob("*.partial")):
        raise WrongError("the store is another, or a part is left")


def _signal_in_run(case: Case, name: str, store: Path) -> None:
    """Ctrl-C in generate: the same model goes on afterwards, and closes."""
    right = case.material.facts["text"][name]

    def action() -> None:
        model = load_model(store, **_OPTIONS)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 0
        try:
            for _ in range(20):
                _wrong_unless(generate(model), right, "the child")
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            code = 130
        _wrong_unless(generate(model), right, "the child, after the signal")
        model.fate.close()
        if code:
            raise KeyboardInterrupt

    _signalled(case, action, 0.5)
    _wrong_unless(text_of(store), right, "a run afterwards")
