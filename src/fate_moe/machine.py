"""Memory of this process and memory available to it, in bytes; respects control groups (version 1 and 2)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_memory", "peak_memory", "resident_memory"]


def resident_memory() -> int:
    """Resident bytes of this process now."""
    return _status("VmRSS")


def peak_memory() -> int:
    """The largest resident memory of this process so far (VmHWM)."""
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    import resource  # macOS has no /proc; the peak, in bytes, is used for both

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_memory() -> int:
    """Bytes that this process may still use: the smaller of the machine's available memory and its control groups' remainders."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        machine = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [machine]
    for limit_file, usage_file in _control_group_files():
        try:
            limit, used = limit_file.read_text().strip(), int(usage_file.read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            limits.append(max(0, int(limit) - used))
    return min(limits)


def _control_group_files() -> list[tuple[Path, Path]]:
    """The (limit, usage) files of this process's memory control group and of all its parents, version 1 or 2."""
    pairs: list[tuple[Path, Path]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return pairs
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = root / group.lstrip("/")
        while folder != root.parent:
            pairs.append((folder / names[0], folder / names[1]))
            folder = folder.parent
    return pairs
