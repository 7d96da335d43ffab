"""Limits the memory of a process, page cache included, with a control group (v1 or v2), and drops the caches before a run."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Group", "can_limit", "drop_caches", "memory_group"]

_ROOTS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # version 1's memory controller, version 2


@dataclass(frozen=True)
class Group:
    """A control group; ``limit_bytes`` None measures only."""

    path: Path
    limit_bytes: int | None

    def command(self, command: list[str]) -> list[str]:
        """``command``, entering the group before it starts."""
        return ["/bin/sh", "-c", f'echo $$ > {shlex.quote(str(self.path / "cgroup.procs"))}; exec "$0" "$@"', *command]

    def peak_bytes(self) -> int | None:
        """The peak memory of the group, page cache included; None if the kernel does not report it."""
        return _number(self.path / "memory.max_usage_in_bytes") or _number(self.path / "memory.peak")

    def kills(self) -> int:
        """Processes of the group that the kernel killed for memory."""
        for name in ("memory.oom_control", "memory.events"):
            if (file := self.path / name).exists():
                return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill ")), 0)
        return 0


def _number(file: Path) -> int | None:
    return int(file.read_text()) if file.exists() else None


def _root() -> Path | None:
    usable = (path for path in _ROOTS if os.access(path, os.W_OK) and (path / "cgroup.procs").exists())
    return next(usable, None) if os.geteuid() == 0 else None


def can_limit() -> str | None:
    """None if memory can be limited here, else the reason."""
    if _root() is None:
        return (
            "memory limits need root and a writable /sys/fs/cgroup with the memory controller; only the unlimited part is measured"
        )
    return None


@contextmanager
def memory_group(limit_bytes: int | None) -> Iterator[Group]:
    """A new group, removed afterwards; without swap if the kernel accounts for swap. Raises OSError without root."""
    root = _root()
    if root is None:
        raise PermissionError(can_limit())
    group = root / f"fate-bench-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        if limit_bytes is not None:
            version1 = (group / "memory.limit_in_bytes").exists()
            (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(str(limit_bytes))
            swap = group / ("memory.memsw.limit_in_bytes" if version1 else "memory.swap.max")
            if swap.exists():
                swap.write_text(str(limit_bytes) if version1 else "0")
        yield Group(group, limit_bytes)
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Remove the group; retries, because only an empty group can be removed and a killed process takes a moment to end."""
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def drop_caches() -> None:
    """Drop the page cache, if permitted, so that the next run starts cold."""
    subprocess.run(["sync"], check=True)
    if os.access(file := "/proc/sys/vm/drop_caches", os.W_OK):
        Path(file).write_text("3")
