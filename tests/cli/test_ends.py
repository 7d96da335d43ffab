"""How the command ends: Ctrl-C, a closed pipe, a full disk, a stream that the caller closed. Quiet, and nothing learned is lost."""

from __future__ import annotations

import builtins
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from fate_moe.cli import chat, listing, main
from fate_moe.engine.prepare import store_for
from fate_moe.store.learned import STATISTICS

pytestmark = pytest.mark.slow

LONG = ["run", "-p", "Once upon a time", "--max-new-tokens", "900"]


def begun(*arguments: str) -> subprocess.Popen[bytes]:
    """``fate`` with these arguments, once it has written some text."""
    command = [sys.executable, "-m", "fate_moe", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert len(process.stdout.read(40)) == 40
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)


def terminate(process: subprocess.Popen[bytes]) -> None:
    process.terminate()


def close_pipe(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize(("end", "code"), [(stop, 130), (close_pipe, 141), (terminate, 143)])
def test_a_quiet_end_keeps_what_was_learned(end: Callable[[subprocess.Popen[bytes]], None], code: int) -> None:
    learned = store_for(None, "lossless") / STATISTICS
    learned.unlink(missing_ok=True)
    process = begun(*LONG)
    end(process)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    process.wait(60)
    process.stderr.close()
    if not (process.stdout is None or process.stdout.closed):
        process.stdout.close()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert "nanobind" not in said
    assert learned.exists()


def closed_streams(*arguments: str, streams: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fate_moe", *arguments]
    return subprocess.run(["sh", "-c", f'exec "$@" {streams}', "sh", *command], capture_output=True, text=True, timeout=120)


def test_closed_streams() -> None:
    done = closed_streams("list", "--json", streams="2>&- <&-")
    assert done.stdout.startswith('{"schema": 1')
    assert not done.stderr
    done = closed_streams("run", "/nowhere/at/all", streams="2>&-")
    assert (done.returncode, done.stdout) == (1, "")
    done = closed_streams("list", streams=">&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_systems_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")

    monkeypatch.setattr(listing, "_list", full)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "fate: /disk/file: No space left on device; free some space, or name another disk\n"
    assert main(["list", "-vv"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_drops_the_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def person(*does: str | type[BaseException]) -> Callable[[str], str]:
        left = list(does)

        def answer(prompt: str) -> str:
            what = left.pop(0)
            if isinstance(what, str):
                return what
            raise what

        return answer

    for does, line in (
        ((KeyboardInterrupt, "Hello"), "Hello"),
        ((KeyboardInterrupt, KeyboardInterrupt), None),
        ((KeyboardInterrupt, "", KeyboardInterrupt, " Hello "), "Hello"),
        ((EOFError,), None),
        (("", "/exit"), None),
        (("/reset",), "/reset"),
    ):
        monkeypatch.setattr(builtins, "input", person(*does))
        assert chat._ask() == line
    assert "/exit or Ctrl-D" in capsys.readouterr().err
