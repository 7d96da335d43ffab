"""The numeric self-check: settings under which libraries compute garbage are mended or refused, by name."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fate_moe.errors import ConfigError
from fate_moe.kernels import selfcheck
from fate_moe.kernels.selfcheck import check_numbers, wrong_numbers


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FATE_HOME without results, in a process without any."""
    monkeypatch.setenv("FATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(selfcheck, "_known", set())
    return tmp_path / "home"


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's bf16 products are not numbers on several threads, whatever this machine does."""
    right = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        bad = x.dtype == torch.bfloat16 and torch.get_num_threads() > 1
        return right(x, weight) * float("nan") if bad else right(x, weight)

    monkeypatch.setattr(selfcheck, "linear", linear)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["OMP_DYNAMIC=TRUE", "OMP_THREAD_LIMIT=1"])
def test_openmp_settings_that_shrink_teams_are_mended(setting: str, home: Path) -> None:
    code = (
        "import logging, torch; logging.basicConfig(format='%(message)s'); torch.set_num_threads(2); "
        "from fate_moe.kernels.selfcheck import check_numbers, wrong_numbers; check_numbers(); "
        "print(torch.get_num_threads(), wrong_numbers())"
    )
    name, _, value = setting.partition("=")
    environment = {**os.environ, name: value, "FATE_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "OpenMP" in done.stderr or sys.platform == "linux":  # elsewhere torch has no GNU OpenMP
        assert done.stderr.startswith(f"{setting}: OpenMP may give torch fewer threads")
    assert done.stdout.split() == ["1", "[]"]


@pytest.mark.slow
def test_garbage_on_several_threads_runs_on_one(
    home: Path, garbage: None, two_threads: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_VERBOSE", "0")
    assert wrong_numbers() == [f"torch's linear in bfloat16, {r} rows of {c} to {o}" for r, o, c in selfcheck._SHAPES]
    check_numbers()
    assert torch.get_num_threads() == 1
    assert "torch's linear in bfloat16, 1 rows of 192 to 256; settings: " in caplog.text
    assert "ONEDNN_VERBOSE=0" in caplog.text


def test_garbage_that_nothing_mends_is_refused_with_the_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    monkeypatch.setattr(selfcheck, "wrong_numbers", lambda: ["torch's softmax", "torch's attention in bfloat16"])
    with pytest.raises(ConfigError, match=r"wrong here: torch's softmax and 1 more; unset .*MKL_CBWR=AUTO"):
        check_numbers()
    assert not home.exists(), "only a right result is kept"


def test_a_right_result_is_kept_for_each_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def right() -> list[str]:
        runs.append(1)
        return []

    monkeypatch.setattr(selfcheck, "wrong_numbers", right)

    def new_process() -> None:
        selfcheck._known.clear()
        check_numbers()

    new_process()
    new_process()
    assert len(runs) == 1
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    new_process()
    assert len(runs) == 2
    (home / "selfcheck.json").write_text("[1, ")
    new_process()
    assert len(runs) == 3
    for number in range(40):
        selfcheck._keep(str(number))
    assert len(json.loads((home / "selfcheck.json").read_bytes())) == 32


def test_a_home_that_cannot_be_written_checks_each_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write_text("a file")
    check_numbers()
    assert home.read_text() == "a file"


def test_products_rounded_by_a_setting_are_mended(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        check_numbers()
        assert torch.get_float32_matmul_precision() == "highest" or not caplog.records  # no bf16 products on this processor
    finally:
        torch.set_float32_matmul_precision("highest")


def test_small_numbers_are_not_flushed_to_zero(home: Path) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        check_numbers()
        assert float(torch.full((1,), 1e-39)) > 0
    finally:
        torch.set_flush_denormal(False)


def test_a_process_that_may_start_no_threads_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if len(started) >= 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(ConfigError, match=r"only 3 of \d+ threads can be started here; raise `ulimit -u`"):
        check_numbers()
    assert not any(thread.is_alive() for thread in started)


def test_a_quota_of_processor_time_gives_fewer_threads(
    home: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selfcheck, "usable_cpus", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with caplog.at_level(logging.INFO):
        check_numbers()
    assert torch.get_num_threads() == 1
    assert "control group" in caplog.text
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    check_numbers()
    assert torch.get_num_threads() == 2, "the user's choice"
