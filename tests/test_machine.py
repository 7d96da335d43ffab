"""What a process may use, in machines made of files: control groups of both versions, namespaces, quotas."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fate_moe.machine import available_memory, usable_cpus

MIB, GIB = 1 << 20, 1 << 30


class Machine:
    """A /proc with 8 GiB available, and control groups mounted at ``groups``."""

    def __init__(self, root: Path, cgroup: str, mounts: list[str]) -> None:
        self.proc, self.groups = root / "proc", root / "with space"
        (self.proc / "self").mkdir(parents=True)
        point = str(self.groups).replace(" ", "\\040")
        (self.proc / "meminfo").write_text(
            "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nCommitLimit: 3145728 kB\nCommitted_AS: 1048576 kB\n"
        )
        (self.proc / "self/cgroup").write_text(cgroup)
        (self.proc / "self/mountinfo").write_text(
            "".join(f"3{i} 23 0:2{i} {mount.format(at=point)}\n" for i, mount in enumerate(mounts))
        )

    def group(self, path: str, **files: object) -> None:
        folder = self.groups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            text = "\n".join(f"{k} {v}" for k, v in content.items()) if isinstance(content, dict) else str(content)
            (folder / name.replace("_", ".", 1)).write_text(text + "\n")

    @property
    def available(self) -> int:
        return available_memory(self.proc)


V2 = "/ {at} rw - cgroup2 cgroup2 rw,nsdelegate"


@pytest.fixture
def unified(tmp_path: Path) -> Machine:
    return Machine(tmp_path, "0::/box/inner\n", [V2])


def test_page_cache_of_a_control_group_counts_as_available(unified: Machine) -> None:
    stat = {"inactive_file": 900 * MIB, "active_file": 300 * MIB, "file_mapped": 100 * MIB, "slab_reclaimable": 50 * MIB}
    unified.group("box/inner", memory_max=1536 * MIB, memory_current=1500 * MIB, memory_stat=stat)
    assert unified.available == (1536 - 1500 + 900 + 300 - 100 + 50) * MIB


def test_page_cache_of_a_version_1_group_counts_as_available(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "4:memory:/box\n0::/\n", ["/ {at} rw - cgroup cgroup rw,memory"])
    stat = {"inactive_file": 1, "total_inactive_file": 700 * MIB, "total_active_file": 0, "total_mapped_file": 0}
    machine.group("box", memory_limit_in_bytes=GIB, memory_usage_in_bytes=1000 * MIB, memory_stat=stat)
    assert machine.available == 724 * MIB


def test_the_smallest_of_a_groups_parents_counts(unified: Machine) -> None:
    unified.group("box/inner", memory_max="max", memory_current=MIB, memory_stat={"inactive_file": 0})
    unified.group("box", memory_max=GIB, memory_current=GIB - 5 * MIB, memory_stat={"inactive_file": 2 * MIB})
    assert unified.available == 7 * MIB


def test_memory_high_is_a_limit(unified: Machine) -> None:
    unified.group("box/inner", memory_max=4 * GIB, memory_high=GIB, memory_current=3 * MIB, memory_stat={"inactive_file": MIB})
    assert unified.available == GIB - 2 * MIB


def test_a_group_over_its_limit_has_nothing_left(unified: Machine) -> None:
    unified.group("box/inner", memory_max=4 * GIB, memory_high=GIB, memory_current=2 * GIB, memory_stat={})
    assert unified.available == 0


def test_swap_of_a_group_is_not_memory(unified: Machine) -> None:
    unified.group("box/inner", memory_max=GIB, memory_current=GIB, memory_swap_max=8 * GIB, memory_stat={"inactive_file": 0})
    assert unified.available == 0


@pytest.mark.parametrize(
    ("name", "root"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../other", "/"), ("/host/path", "/docker/abc")]
)
def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path, name: str, root: str) -> None:
    machine = Machine(tmp_path, f"0::{name}\n", [V2.replace("/ ", root + " ", 1)])
    machine.group(".", memory_max=GIB, memory_current=0, memory_stat={"inactive_file": 0})
    assert machine.available == GIB


def test_a_group_without_limits_leaves_what_the_machine_has(unified: Machine) -> None:
    unified.group("box/inner", memory_max="max", memory_high="max", memory_current=MIB, memory_stat={})
    assert unified.available == 8 * GIB


def test_strict_overcommit_counts(unified: Machine) -> None:
    (unified.proc / "sys/vm").mkdir(parents=True)
    (unified.proc / "sys/vm/overcommit_memory").write_text("2\n")
    assert unified.available == 2 * GIB


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_ulimit_counts(limit: str) -> None:
    code = "from fate_moe.machine import available_memory; print(available_memory())"

    def restrict() -> None:
        resource.setrlimit(getattr(resource, limit), (512 * MIB, 512 * MIB))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=restrict, capture_output=True, text=True, check=True)
    assert 300 * MIB < int(done.stdout) < 512 * MIB


def test_a_quota_of_processor_time_counts(unified: Machine, tmp_path: Path) -> None:
    everything = len(os.sched_getaffinity(0))
    assert usable_cpus(unified.proc) == everything
    unified.group("box/inner", cpu_max="max 100000")
    unified.group("box", cpu_max="50000 100000")
    assert usable_cpus(unified.proc) == 1
    older = Machine(tmp_path / "older", "2:cpuacct,cpu:/\n", ["/ {at} rw - cgroup cgroup rw,cpu,cpuacct"])
    older.group(".", cpu_cfs_quota_us=100000, cpu_cfs_period_us=100000)
    assert usable_cpus(older.proc) == 1
    older.group(".", cpu_cfs_quota_us=-1)
    assert usable_cpus(older.proc) == everything


@pytest.mark.slow
def test_a_store_of_many_files_raises_the_limit_of_open_files() -> None:
    code = (
        "import resource as r; from fate_moe.machine import allow_open_files; r.setrlimit(r.RLIMIT_NOFILE, (70, 300)); "
        "allow_open_files(100); print(*r.getrlimit(r.RLIMIT_NOFILE)); allow_open_files(1000); print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, _, second = done.stdout.partition("\n")
    assert 164 < int(first.split()[0]) < 300
    assert second.split() == ["300", "300"]
