"""Real processes that convert and can be killed, without waiting seconds for imports: a server that has imported, and forks.

Run as a script it is the server. A request is one line of JSON; the answers are the child's process id, then how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fate_moe.core import PRECISIONS


class Children:
    """The test's side of the server, which has converted ``warm_up`` once: transformers imports families when they are needed."""

    def __init__(self, warm_up: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.children", str(warm_up)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def start(self, source: Path, destination: Path, **request: Any) -> int:
        """Fork a child that converts; its process id."""
        self._ask(json.dumps({"source": str(source), "destination": str(destination), **request}))
        return int(self._answer()["pid"])

    def wait(self) -> dict[str, Any]:
        """``status`` of the child (0: converted, -9: killed), and what it says of itself if it was asked to."""
        self._ask("wait")  # until now it is a zombie at the least, so that its process id is nobody else's
        return self._answer()

    def convert(self, source: Path, destination: Path, **request: Any) -> dict[str, Any]:
        self.start(source, destination, **request)
        return self.wait()

    def close(self) -> None:
        self._server.communicate()
        assert self._server.returncode == 0

    def _ask(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        return dict(json.loads(self._server.stdout.readline()))


def _serve() -> None:
    import torch

    from fate_moe.store.convert import convert

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            convert(sys.argv[1], Path(folder) / precision, precision)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reader)
            _child(request, writer)
        os.close(writer)
        print(json.dumps({"pid": pid}), flush=True)
        sys.stdin.readline()
        with os.fdopen(reader) as told:
            said = told.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status, **json.loads(said or "{}")}), flush=True)


def _child(request: dict[str, Any], writer: int) -> None:
    from fate_moe.store.convert import convert

    status = 1
    try:
        if "warm_up" in request:  # a fork's file-backed pages count as its own only once touched
            convert(request["warm_up"], request["warm_up"] + "-store", request.get("precision", "lossless"))
        if "die_at" in request:
            _die_at_change(request["die_at"])
        before, began = _reset_peak(), time.perf_counter()
        convert(request["source"], request["destination"], request.get("precision", "lossless"))
        said = {"seconds": time.perf_counter() - began, "rss_bytes": before, "peak_bytes": _memory("VmHWM")}
        os.write(writer, json.dumps(said).encode())
        status = 0
    finally:
        os._exit(status)


def _die_at_change(number: int) -> None:
    """Kill this process right before its ``number``-th call that changes what is on the disk."""
    left = [number]

    def deadly(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **options)

        return wrapped

    for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _serve()
