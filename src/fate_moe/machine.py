"""Memory and processors that this process may use: the machine's, less what control groups (version 1 and 2) and ulimits forbid.

What a control group can give back at once, the page cache of files that were read, counts as available, as in the kernel's
MemAvailable. ``proc`` is /proc; tests give another folder.
"""

from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["affinity", "allow_open_files", "available_memory", "peak_memory", "resident_memory", "usable_cpus"]

_PROC = Path("/proc")
_SPARE_FILES = 64  # what libraries open meanwhile


def resident_memory() -> int:
    """Resident bytes of this process now."""
    return _status("VmRSS")


def peak_memory() -> int:
    """The largest resident memory of this process so far (VmHWM)."""
    return _status("VmHWM")


def _status(field: str, proc: Path = _PROC) -> int:
    if (found := _fields(proc / "self/status").get(field)) is not None:
        return found
    # macOS has no /proc; the peak, in bytes, is used for both.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_memory(proc: Path = _PROC) -> int:
    """Bytes that this process may still use: the least of what the machine, its control groups and its ulimits leave."""
    facts = _fields(proc / "meminfo")
    limits = [facts.get("MemAvailable", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    if _numbers(proc / "sys/vm/overcommit_memory") == [2]:  # the kernel promises no more than this, used or not
        limits.append(facts["CommitLimit"] - facts["Committed_AS"])
    for name, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY:
            limits.append(soft - _status(used, proc))
    for group in _groups("memory", proc):
        with suppress(OSError, ValueError):
            limits.append(_left(group))
    return max(0, min(limits))


def affinity() -> int:
    """Processors that the scheduler may run this process on, whatever control groups say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus(proc: Path = _PROC) -> int:
    """Processors that this process may keep busy: those of its affinity, or fewer where a control group has a quota of time."""
    allowed = [float(affinity())]
    for group in _groups("cpu", proc):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if group.version == 2:
                quota, period = (group.folder / "cpu.max").read_text().split()
            else:
                quota, period = ((group.folder / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period"))
            if quota not in ("max", "-1"):
                allowed.append(int(quota) / int(period))
    return max(1, math.ceil(min(allowed)))


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files, as far as it may be, so that ``count`` more fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        wanted = len(os.listdir("/dev/fd")) + count + _SPARE_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


@dataclass(frozen=True)
class _Group:
    """The folder of a control group and the version of its hierarchy."""

    folder: Path
    version: int


def _left(group: _Group) -> int:
    """Bytes that the group's limits leave. Raises OSError or ValueError where it has none."""
    try:
        facts: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", (group.folder / "memory.stat").read_text(), flags=re.MULTILINE))
    except OSError:
        facts = {}

    def stat(name: str) -> int:
        # Version 1 has the sums over the group's children as total_*.
        return int(facts.get(f"total_{name}", facts.get(name, 0)) if group.version == 1 else facts.get(name, 0))

    def number(name: str) -> float:
        try:
            text = (group.folder / name).read_text().strip()
        except FileNotFoundError:  # memory.high is younger than memory.max
            return math.inf
        return math.inf if text == "max" else int(text)

    if group.version == 1:
        limit, used, mapped = number("memory.limit_in_bytes"), number("memory.usage_in_bytes"), stat("mapped_file")
    else:
        limit, used, mapped = min(number("memory.max"), number("memory.high")), number("memory.current"), stat("file_mapped")
    if math.inf in (limit, used):
        raise ValueError("no limit")
    # Mapped pages are programs and libraries at work, which would be read again at once.
    reclaimable = max(0, stat("inactive_file") + stat("active_file") - mapped) + stat("slab_reclaimable")
    return int(limit - max(0, used - reclaimable))


def _groups(controller: str, proc: Path) -> Iterator[_Group]:
    """This process's control group for ``controller`` and its parents, as far as they are mounted here."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
        mounts = list(_mounts(proc))
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        for mounted, root, point in mounts:
            if mounted != ("cgroup2" if version == 2 else controller):
                continue
            # A container without a namespace of its own sees its group mounted as if it were the topmost one.
            inside = os.path.relpath(name, root) if (name + "/").startswith(root.rstrip("/") + "/") else "."
            folder = point / inside
            while True:
                yield _Group(folder, version)
                if folder == point or point not in folder.parents:
                    break
                folder = folder.parent


def _mounts(proc: Path) -> Iterator[tuple[str, str, Path]]:
    """(controller of version 1 or "cgroup2", path of the group that is mounted, where) for each mounted hierarchy."""
    for line in (proc / "self/mountinfo").read_text().splitlines():
        fields, _, described = line.partition(" - ")
        kind, _, options = described.split(" ", 2)
        if not kind.startswith("cgroup"):
            continue
        root, point = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), text) for text in fields.split()[3:5])
        for name in ["cgroup2"] if kind == "cgroup2" else options.split(","):
            yield name, root, Path(point)


def _fields(path: Path) -> dict[str, int]:
    """The amounts in bytes of a file of lines like "VmRSS:  12 kB"; {} where there is no such file."""
    try:
        found = re.findall(r"^(\w+):\s+(\d+) kB$", path.read_text(), flags=re.MULTILINE)
    except OSError:
        return {}
    return {name: int(amount) << 10 for name, amount in found}


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
