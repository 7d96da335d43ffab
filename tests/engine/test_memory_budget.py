"""The budget is a promise. The report's peak is the kernel's, and stays under the budget."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fate_moe import demo
from fate_moe.core import ExpertId
from fate_moe.engine.prepare import store_for
from fate_moe.store.convert import convert

pytestmark = pytest.mark.slow

# A process that is started from a big one inherits its peak (ru_maxrss survives vfork and exec), so a small one stands between.
WITNESS = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10, file=sys.stderr)
sys.exit(code)
"""


def run(*arguments: str, prefix: tuple[str, ...] = (), threads: int = 1) -> tuple[int, dict[str, dict[str, int]], int, str]:
    """(exit code, the run's JSON, peak resident bytes as the kernel counted them, standard error)."""
    command = [sys.executable, "-m", "fate_moe", "run", "--json", "--max-new-tokens", "40", "--no-do-sample", *arguments]
    done = subprocess.run(
        [*prefix, sys.executable, "-c", WITNESS, *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    errors, _, peak = done.stderr.rstrip().rpartition("\n")
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, int(peak), errors


@pytest.fixture(scope="module")
def smallest() -> int:
    """The smallest budget the embedded model works in, as the refusal names it, in MiB."""
    store_for(None, "lossless")
    code, _, _, errors = run("--ram", "50MiB")
    assert code == 1, errors
    return int(re.search(r"at least --ram (\d+)MiB", errors)[1])  # type: ignore[index]


@pytest.mark.parametrize(("extra", "threads"), [(2, 1), (16, 2)])
def test_peak_stays_under_the_budget_and_is_the_kernels(smallest: int, extra: int, threads: int) -> None:
    code, result, peak, errors = run("--ram", f"{smallest + extra}MiB", threads=threads)
    assert code == 0, errors
    memory = result["memory"]
    assert memory["budget_bytes"] == smallest + extra << 20
    assert peak <= memory["budget_bytes"]
    assert abs(memory["peak_bytes"] - peak) <= 0.05 * peak
    assert result["config"]["expert_cache_bytes"] < 0.9 * 43e6, "the experts would have fitted; nothing was shown"


def test_a_mixed_stores_peak_stays_under_the_budget(smallest: int, tmp_path: Path) -> None:
    """As near to it as a lossless store's; about a third of the experts fit."""
    rules: dict[int | ExpertId, str] = {0: "int8"}
    store = convert(demo.MODEL, tmp_path / "mixed", "lossless", dense_precision="lossless", precision_rules=rules, solver="minmax")
    code, result, peak, errors = run(str(store), "Once upon a time", "--ram", f"{smallest + 20}MiB")
    assert code == 0, errors
    assert peak <= result["memory"]["budget_bytes"]
    assert 10 << 20 < result["config"]["expert_cache_bytes"] < 0.9 * 66e6, "the experts would have fitted; nothing was shown"


@pytest.mark.root
def test_under_a_control_group(smallest: int) -> None:
    """A hard limit of the budget plus 5 %, page cache included: the process is not killed and need not swap."""
    parents = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    parent = next((path for path in parents if os.access(path, os.W_OK) and (path / "cgroup.procs").exists()), None)
    if parent is None or os.geteuid() != 0:
        pytest.skip("needs root and a control group")
    group = parent / f"fate-test-{os.getpid()}"
    group.mkdir()
    try:
        version1 = (group / "memory.limit_in_bytes").exists()
        limit = (smallest + 8) * 1.05
        (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(str(int(limit) << 20))
        enter = ("/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"')
        code, result, _, errors = run("--ram", f"{smallest + 8}MiB", prefix=enter)
        assert code == 0, errors
        assert result["memory"]["peak_bytes"] <= result["memory"]["budget_bytes"]
    finally:
        group.rmdir()
