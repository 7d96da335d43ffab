"""The outer net: whatever a verb raises is one line and an exit code, and what is said elsewhere does not reach the user."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fate_moe.cli import listing, main
from fate_moe.cli.net import uninterrupted
from fate_moe.errors import StoreError


class Panic(BaseException):
    """As tokenizers' own, which is no Exception."""


def raising(error: BaseException) -> Callable[[object], None]:
    def verb(arguments: object) -> None:
        raise error

    return verb


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StoreError("the store\nis torn"), "fate: the store is torn"),
        (StoreError("red \x1b[31m name"), "fate: red \ufffd[31m name"),
        (MemoryError(), "fate: memory ran out (MemoryError); give a smaller --ram"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes\nat x"),
            "DefaultCPUAllocator: can't allocate memory: 9 bytes); give a smaller --ram",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "fate: memory ran out (CUDA out of memory"),
        (RecursionError("maximum recursion depth exceeded"), "fate: something that was read is nested too deeply"),
        (RuntimeError("can't start new thread"), "the system allows no more; allow more (ulimit -u)"),
        (ImportError("libcudart.so: no such file", name="torch._C"), "install it again: pip install --force-reinstall torch"),
        (Panic("index out of bounds"), "fate: Panic: index out of bounds; this error is not known, the same with -vv"),
        (ValueError("x" * 5000), "xxx"),
        (
            OSError(errno.EMFILE, "Too many open files", "/a/b"),
            "fate: /a/b: Too many open files; allow more open files (ulimit -n)",
        ),
        (OSError(errno.EROFS, "Read-only file system", b"/a\nb"), "fate: /a b: Read-only file system; name a place"),
        (OSError("no number"), "fate: OSError: no number"),
        (SystemExit("a library's last words"), "fate: a library's last words"),
    ],
)
def test_what_is_raised_is_one_line(
    error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "_list", raising(error))
    assert main(["list"]) == 1
    said = capsys.readouterr()
    assert line in said.err
    assert said.err.count("\n") == 1
    assert len(said.err) < 2200
    assert said.out == ""


def test_quiet_ends_have_codes_of_their_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = ImportError("initialization failed")
    wrapped.__context__ = KeyboardInterrupt()
    for error, code in ((KeyboardInterrupt(), 130), (wrapped, 130), (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141)):
        monkeypatch.setattr(listing, "_list", raising(error))
        assert main(["list", "-vv"]) == code
        assert capsys.readouterr().err == ""


def test_warnings_of_libraries_are_for_verbose_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(arguments: object) -> None:
        warnings.warn("a library's warning", UserWarning, stacklevel=1)
        logging.getLogger("huggingface_hub").warning("a library's message")
        logging.getLogger("fate_moe.test").warning("ours")

    monkeypatch.setattr(listing, "_list", noisy)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert main(["list"]) == 0
        assert capsys.readouterr().err == "ours\n"
        assert seen == []
        assert main(["list", "-v"]) == 0
        assert [str(one.message) for one in seen] == ["a library's warning"]
    said = capsys.readouterr().err
    assert said.count("ours\n") == 1
    assert "a library's message" in said


def test_a_signal_ends_the_verb_as_an_exception_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[str] = []

    def keep() -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # once more, while it keeps
        kept.append("statistics")

    def verb(arguments: object) -> None:
        with uninterrupted(keep):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(listing, "_list", verb)
    with pytest.raises(SystemExit) as left:
        main(["list"])
    assert left.value.code == 128 + signal.SIGTERM
    assert kept == ["statistics"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == ""


def test_nohup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(listing, "_list", lambda arguments: os.kill(os.getpid(), signal.SIGHUP))
        assert main(["list"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def shell(line: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``line`` in bash, where $FATE is the command; exit codes of a pipe's parts are printed by the line itself."""
    variables = {**os.environ, "FATE": f"{sys.executable} -m fate_moe", "FATE_HOME": str(home), **environment}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env=variables)


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_standard_output_on_a_full_disk(environment: dict[str, str], tmp_path: Path) -> None:
    for verb in ("list --json", "help run", "--version"):
        done = shell(f"$FATE {verb} > /dev/full", tmp_path, **environment)
        assert done.returncode == 1, verb
        assert done.stderr == "fate: standard output: No space left on device; free some space, or name another disk\n"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("$FATE list | { exec <&-; sleep 1; }; echo ${PIPESTATUS[0]}", "141"),
        ("$FATE help run | { exec <&-; sleep 1; }; echo ${PIPESTATUS[0]}", "141"),
        ("$FATE list >&-; echo $?", "0"),
        ("$FATE rm nothing 2>&-; echo $?", "1"),
        ("$FATE rm nothing 2> >(exec <&-); echo $?", "1"),
        ("$FATE rm nothing 2>/dev/full; echo $?", "1"),
        ("$FATE list <&- >&- 2>&-; echo $?", "0"),
    ],
)
def test_streams_that_nobody_reads(line: str, code: str, tmp_path: Path) -> None:
    done = shell(line, tmp_path)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stdout.split()[-1] == code


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_terminals_without_unicode_get_replacements(environment: dict[str, str], tmp_path: Path) -> None:
    home = tmp_path / "\u65e5\u672c \U0001f600"
    done = shell("$FATE list; $FATE rm '\u65e5\u672c'", home, **environment, PYTHONCOERCECLOCALE="0")
    assert "no stores in" in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "there is no store" in done.stderr


@pytest.mark.parametrize("columns", ["0", "1", "-5", "words", "100000"])
def test_windows_of_any_width(columns: str, tmp_path: Path) -> None:
    store = tmp_path / "stores" / "a[red]b :smile:"
    store.mkdir(parents=True)
    (store / "fate.json").write_text('{"source": "[/nothing]", "precision": "int4"}')
    done = shell("$FATE list", tmp_path, COLUMNS=columns, TERM="dumb", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if columns == "100000":
        assert store.name in done.stdout
        assert "[/nothing]" in done.stdout
        assert "\x1b" not in done.stdout


def test_ctrl_c_is_quiet() -> None:
    """Whatever is being imported: no traceback, and the shell's code for an interruption."""
    program = "import os, signal, sys, time\nfrom fate_moe.cli import main, listing\n"
    program += "def slow():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(20)\n"
    program += "listing.stored_models = slow\nsys.argv = ['fate', 'list']\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
