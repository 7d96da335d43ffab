"""Every switch: read, refused in one line where its value has no meaning, documented."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fate_moe
from fate_moe import switches
from fate_moe.cli import main
from fate_moe.errors import ConfigError
from fate_moe.kernels.native import native

pytestmark = pytest.mark.slow

needs_extension = pytest.mark.skipif(native is None, reason="the extension is not built")


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FATE_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**environment, **variables}, capture_output=True, text=True, timeout=120
    )


def test_all_are_here_and_documented() -> None:
    root = Path(fate_moe.__file__).parent
    named = {name for path in root.rglob("*.py") for name in re.findall(r"\bFATE_[A-Z]+(?:_[A-Z]+)*\b", path.read_text())}
    assert named == set(switches.NAMES)
    assert all(f"\n{name} " in (switches.__doc__ or "") for name in switches.NAMES)
    for path in root.rglob("*.py"):
        assert "environ" not in path.read_text() or path.name == "switches.py", f"{path} reads the environment"


@pytest.mark.parametrize("name", ["FATE_CHECK", "FATE_FUSE", "FATE_NATIVE", "FATE_KERNELS", "FATE_LOG"])
def test_a_wrong_value_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(ConfigError, match=f"{name}=perhaps is not one of"):
        switches.check()
    assert main(["list"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"fate: {name}=perhaps is not one of")


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for read, name, default in (
        (switches.fuse, "FATE_FUSE", True),
        (switches.use_native, "FATE_NATIVE", True),
        (switches.check_each_pass, "FATE_CHECK", False),
    ):
        monkeypatch.delenv(name, raising=False)
        assert read() is default
        for value, meaning in (("", default), ("0", False), ("1", True)):
            monkeypatch.setenv(name, value)
            assert read() is meaning
        monkeypatch.delenv(name)


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FATE_HOME", str(tmp_path / "new"))
    assert switches.cache_home() == tmp_path / "new"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FATE_HOME", "~/x")
    assert switches.cache_home() == tmp_path / "x"
    monkeypatch.delenv("FATE_HOME")
    assert switches.cache_home() == tmp_path / ".cache" / "fate"
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for wrong in ("file", "dangling"):
        monkeypatch.setenv("FATE_HOME", str(tmp_path / wrong))
        with pytest.raises(ConfigError, match="is not a folder"):
            switches.cache_home()


def test_home_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert switches.cache_home() == tmp_path / "xdg" / "fate"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert switches.cache_home() == tmp_path / ".cache" / "fate"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / ".cache" / "fate").mkdir(parents=True)
    assert switches.cache_home() == tmp_path / ".cache" / "fate", "stores that are there stay in use"
    monkeypatch.setenv("HOME", "relative")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(ConfigError, match="set FATE_HOME"):
        switches.cache_home()


@pytest.mark.parametrize(
    ("arguments", "variable", "level"),
    [
        ([], None, logging.WARNING),
        ([], "info", logging.INFO),
        ([], "debug", logging.DEBUG),
        (["-v"], None, logging.INFO),
        (["-vv"], "warning", logging.DEBUG),
        (["--verbose"], "debug", logging.INFO),
    ],
)
def test_logging(arguments: list[str], variable: str | None, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("fate_moe")
    before, levels = log.level, list[int]()

    def misspelt() -> list[str]:
        levels.append(log.level)
        return []

    monkeypatch.setattr(switches, "misspelt", misspelt)
    if variable is not None:
        monkeypatch.setenv("FATE_LOG", variable)
    assert main(["list", *arguments]) == 0
    assert main([*arguments, "list"]) == 0
    assert levels == [level, level]
    assert log.level == before, "a program that calls main has its own level afterwards"


def test_a_misspelt_switch_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FATE_KERNEL", "avx2")
    monkeypatch.setenv("FATE_OF_THE_SHIP", "unknown")
    assert main(["list"]) == 0
    assert capsys.readouterr().err.splitlines() == ["FATE_KERNEL is not read; did you mean FATE_KERNELS?"]


SHOW = "from fate_moe.kernels.native import native, why_not; print(native and native.instruction_set(), why_not())"


# Each value in a process of its own, which finds torch imported: that is what takes long.
SHOW_EACH = f"""
import os, sys, traceback
import torch
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        os.environ["FATE_KERNELS"] = name
        try:
            {SHOW}
        except BaseException as error:
            print(*traceback.format_exception_only(error), end="")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


@needs_extension
def test_kernels_are_chosen() -> None:
    available = native.instruction_sets()
    done = python(SHOW_EACH, *switches.KERNELS)
    lines = done.stdout.splitlines()
    assert len(lines) == len(switches.KERNELS), done.stderr
    for of, line in zip(switches.KERNELS.values(), lines, strict=True):
        if of in available:
            assert line.split() == [of, "None"]
        else:
            assert f"ConfigError: FATE_KERNELS: this processor and this build do not have {of}; they have portable" in line
    assert python(SHOW).stdout.split() == [available[0], "None"]


@needs_extension
def test_kernels_that_are_not_there_are_one_line_of_the_command() -> None:
    missing = next(name for name, of in switches.KERNELS.items() if of not in native.instruction_sets())
    done = python("import sys; from fate_moe.cli import main; sys.exit(main(['doctor']))", FATE_KERNELS=missing)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"fate: FATE_KERNELS: this processor and this build do not have {missing}")


def test_without_the_extension() -> None:
    done = python(SHOW, FATE_NATIVE="0")
    assert done.stdout.startswith("None FATE_NATIVE=0 turns the C++ kernels off"), done.stderr
    code = "import fate_moe.memory.statistics as statistics; print(statistics.native)"
    assert python(code, FATE_NATIVE="0").stdout.strip() == "None"
    assert "unset one of them" in python(SHOW, FATE_NATIVE="0", FATE_KERNELS="portable").stderr
    text = "import sys; from fate_moe.cli import main; sys.exit(main(['doctor']))"
    assert "turned off" in python(text, FATE_NATIVE="0").stdout
