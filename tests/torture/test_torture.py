"""The short form of the torture run; and that the run finds what it is there to find."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fate_moe.errors import StoreError
from fate_moe.store import open as opening
from tests.support.checkpoints import tiny_checkpoint
from tests.torture.case import Area, Case, Material, WrongError, refusal
from tests.torture.faults import Faults
from tests.torture.files import read_all
from tests.torture.workers import do, outcomes

pytestmark = pytest.mark.slow


def test_the_short_form_finds_nothing() -> None:
    """A hundred cases and more, of all areas but the budgets, which take a process each; the faults were really injected."""
    command = [sys.executable, "-m", "tests.torture", "--short", "--seed", "1", "--workers", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["failures"] == []
    areas = summary["areas"]
    assert all(area["cases"] > 0 for name, area in areas.items() if name != "budget")
    assert areas["store"]["refused"] > 20
    assert areas["store"]["right"] > 0
    assert areas["faulty-run"]["counts"]["errors"] > 0, "nothing failed: the reader does not go through what the faults replace"
    assert areas["faulty-run"]["counts"]["failed experts"] > 0
    assert areas["faulty-conversion"]["counts"]["errors"] > 0
    assert areas["killed-conversion"]["counts"]["kills"] > 0
    assert areas["killed-keeping"]["counts"]["damaged blocks"] > 0


def ends(case: Case) -> str:
    """One way to fail for each number."""
    ways: dict[int, Callable[[], object]] = {
        1: lambda: os.kill(os.getpid(), signal.SIGKILL),
        2: lambda: time.sleep(60),
        3: lambda: [].__getitem__(5),
        4: lambda: case.counts.update(size=len(bytearray(64 << 20))),
        5: lambda: refusal(lambda: raise_error("one\ntwo")),
    }
    if case.number == 6:
        return "third state"
    if case.number in ways:
        ways[case.number]()
    return "right"


def raise_error(text: str) -> None:
    raise StoreError(text)


def test_crashes_hangs_foreign_errors_and_memory_are_found(tmp_path: Path) -> None:
    area = Area("test", "", ends, 1, 0, limit_seconds=3.0, most_bytes=32 << 20)
    jobs = ((area, number) for number in range(8))
    found = {outcome.number: outcome.outcome for outcome in outcomes(jobs, 1, Material(tmp_path, {}), tmp_path / "work", 2)}
    assert found == {
        0: "right", 1: "crash", 2: "hang", 3: "foreign error", 4: "memory", 5: "wrong", 6: "wrong", 7: "right",
    }  # fmt: skip


def test_a_reader_that_checks_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fate_moe.store import reader
    from fate_moe.store.convert import convert

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    whole = convert(tiny_checkpoint("mixtral", tmp_path / "checkpoint", **sizes), tmp_path / "whole", "int4")

    def flipped(case: Case) -> str:
        store = Path(shutil.copytree(whole, case.work / "store"))
        shard = bytearray((store / "experts-00001-of-00002.safetensors").read_bytes())
        shard[opening.open_store(whole).manifest.layers[0].experts[3].offset] ^= 1
        (store / "experts-00001-of-00002.safetensors").write_bytes(shard)
        return "right" if refusal(lambda: read_all(store, whole)) is None else "refused"

    area = Area("store", "", flipped, 1, 0, most_bytes=1 << 40)
    assert do(area, 1, 0, Material(tmp_path, {}), tmp_path / "work").outcome == "refused"
    for module in (opening, reader):
        monkeypatch.setattr(module, "check_section", lambda *arguments: None)
    found = do(area, 1, 0, Material(tmp_path, {}), tmp_path / "work")
    assert (found.outcome, "other bytes" in found.detail) == ("wrong", True)


def test_faults_come_as_often_as_asked_and_go_with_the_block() -> None:
    before, counts = os.preadv, {"errors": 0}
    with Faults(Random(1), 1.0, counts):
        with pytest.raises(OSError, match="error"):
            os.preadv(0, [memoryview(bytearray(1))], 0)
        with pytest.raises(OSError, match=r"error|space"):
            os.fsync(0)
    assert os.preadv is before
    assert counts["errors"] == 2


def test_an_error_of_two_lines_is_wrong() -> None:
    assert refusal(lambda: raise_error("it is damaged; convert again")) == "it is damaged; convert again"
    with pytest.raises(WrongError):
        refusal(lambda: raise_error("a\nb, and more of it"))
