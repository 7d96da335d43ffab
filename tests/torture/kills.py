"""kill -9 at random moments: the old state or the new one, never a third, and the next run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fate_moe.errors import FateError
from fate_moe.store.convert import convert
from fate_moe.store.learned import (
    load_gates,
    load_statistics,
    load_view_losses,
    save_gates,
    save_statistics,
    save_view_losses,
)
from fate_moe.store.open import open_store
from fate_moe.trace.schema import read_trace, write_trace
from tests.support.reading import snapshot
from tests.torture.case import Case, WrongError
from tests.torture.material import learned_arrays, text_of

__all__ = ["REFUSED", "child", "ended", "kill", "killed_conversion", "killed_run", "killed_saving"]

REFUSED = 3  # how a child ends that raised a FateError

_durations: dict[str, float] = {}  # of an undisturbed conversion in this process, by store


def child(action: Callable[[], object]) -> int:
    """Fork; the child does ``action`` and ends with 0, or 1 if it raises. Returns its process id."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            action()
            code = 0
        except FateError:
            code = REFUSED
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """How the child ended: its exit code, or the negative number of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(case: Case, pid: int, seconds: float) -> bool:
    """Kill the child at a moment within ``seconds``; whether that hit it."""
    time.sleep(case.dice.uniform(0, seconds))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    hit = ended(pid) == -signal.SIGKILL
    case.counts["kills"] = case.counts.get("kills", 0) + hit
    return hit


def killed_conversion(case: Case) -> str:
    """A conversion is killed one to four times, then ends: no store meanwhile but the whole one, the same bytes at the end."""
    name = case.dice.choice(case.material.facts["stores"])
    family, precision = name.rsplit("-", 1)
    checkpoint, store = case.material.home / "checkpoints" / family, case.work / "store"
    expected = snapshot(case.material.home / "plain" / name)
    case.kind = f"conversion {precision}"
    if name not in _durations:
        began = time.perf_counter()
        convert(checkpoint, case.work / "measured", precision)
        _durations[name] = time.perf_counter() - began
        shutil.rmtree(case.work / "measured")
    for _ in range(case.dice.randrange(1, 5)):
        kill(case, child(lambda: convert(checkpoint, store, precision)), _durations[name] * 1.3)
        if store.exists() and snapshot(store) != expected:
            raise WrongError("there is half a store under its name")
    convert(checkpoint, store, precision)
    if snapshot(store) != expected:
        raise WrongError("after a kill the store has other bytes")
    if left := [path.name for path in case.work.iterdir() if path != store]:
        raise WrongError(f"left behind: {left}")
    return "right"


def killed_saving(case: Case) -> str:
    """Learned state or a trace is written again and again, and killed: one of the states that were written is there, whole."""
    store = Path(shutil.copytree(case.material.home / "plain" / "mixtral-int4", case.work / "store"))
    what = case.dice.choice(("gates", "statistics", "losses", "trace"))
    case.kind = f"saving {what}"
    write_trace(store / "trace.npz", read_trace(case.material.home / "trace.npz"))
    for seed in (1, 1):
        _save(store, what, seed)

    def saves() -> None:
        for turn in range(100_000):
            _save(store, what, 1 + turn % 2)

    pid = child(saves)
    hit = kill(case, pid, 0.05)
    state = _load(store, what)
    if state not in (1, 2):
        raise WrongError(f"{what}: a third state: {state!r}")
    leftovers = list(store.glob("*.tmp"))
    if len(leftovers) > 1:
        raise WrongError(f"{what}: one kill left {[path.name for path in leftovers]}")
    if text_of(store) != case.material.facts["text"]["mixtral-int4"]:
        raise WrongError(f"{what}: the text is another")
    for path in leftovers:  # an hour later
        os.utime(path, (1, 1))
    _save(store, what, 2)
    if _load(store, what) != 2 or list(store.glob("*.tmp")):
        raise WrongError(f"{what}: the next save left {[path.name for path in store.glob('*.tmp')]}")
    return "right" if hit else "skipped"


def _save(store: Path, what: str, seed: int) -> None:
    arrays = learned_arrays(seed)
    if what == "gates":
        save_gates(store, arrays["gates"])
    elif what == "statistics":
        save_statistics(store, arrays["statistics"])
    elif what == "losses":
        save_view_losses(store, arrays["losses"])
    else:
        trace = read_trace(store / "trace.npz")
        trace.meta["slots"] = seed
        write_trace(store / "trace.npz", trace)


def _load(store: Path, what: str) -> Any:
    """Which state is there: 1, 2, or what else."""
    if what == "trace":
        return read_trace(store / "trace.npz").meta["slots"]
    if what == "losses":
        losses = load_view_losses(store)
        return next((seed for seed in (1, 2) if losses == learned_arrays(seed)["losses"]), losses)
    if what == "statistics":
        state = load_statistics(store)
        return next(
            (s for s in (1, 2) if state and np.array_equal(state["recent"], learned_arrays(s)["statistics"]["recent"])), state
        )
    gates = load_gates(store, [8, 8], 32)
    for seed in (1, 2):
        want = learned_arrays(seed)["gates"]
        if gates and all(g is not None and g.equal(w.bfloat16()) for g, w in zip(gates.ahead[0], want, strict=True)):
            return seed
    return gates


def killed_run(case: Case) -> str:
    """A process that loads, writes text and keeps what it learned is killed; the store is whole and the text right."""
    name = case.dice.choice(case.material.facts["stores"])
    store = Path(shutil.copytree(case.material.home / "stores" / name, case.work / "store"))
    case.kind = "a run"
    hit = [kill(case, child(lambda: text_of(store)), 0.4) for _ in range(case.dice.randrange(1, 4))]
    open_store(store)
    if text_of(store) != case.material.facts["text"][name]:
        raise WrongError("after a kill the text is another")
    return "right" if any(hit) else "skipped"
