"""Random budgets under a real control group: the peak stays within, and the smallest budget that a refusal names works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fate_moe.registry import POLICIES
from tests.torture.case import Case, WrongError

__all__ = ["budget"]

# A process that is started from a big one inherits its peak, so a small one stands between.
_WITNESS = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10, file=sys.stderr)
sys.exit(code)
"""
_PREDICTORS = ("combined", "cross-layer", "none", "temporal")
_SLACK = 1.05  # of the control group's limit: it counts the page cache too


def budget(case: Case) -> str:
    """One model, precision, context, policy and budget, in a process of its own."""
    name = case.dice.choice((*case.material.facts["stores"], None, None))
    options: dict[str, Any] = {
        "context_length": case.dice.choice((64, 256, 1024)),
        "policy": case.dice.choice(sorted(POLICIES)),
        "predictor": case.dice.choice(_PREDICTORS),
        "io_threads": case.dice.choice((2, 4, 8)),
        "exact_activations": case.dice.random() < 0.2,
    }
    precision = case.dice.choice(("lossless", "int4", "int8"))
    extra = case.dice.choice((0, 0, case.dice.randrange(1 << 20), case.dice.randrange(64 << 20)))
    store = str(case.material.home / "stores" / name) if name else ""
    case.kind = name or f"embedded-{precision}"
    if not name:
        store = _embedded(case, precision)
    group = _control_group(case)
    job = json.dumps(
        {"store": store, "options": options, "extra": extra, "tokens": case.dice.randrange(1, 60), "group": str(group or "")}
    )
    command = [sys.executable, "-c", _WITNESS, sys.executable, "-m", "tests.torture.budgets", job]
    if group is not None:
        command = ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"', *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    finally:
        if group is not None:
            _remove(group)
    said, _, peak = done.stderr.rstrip().rpartition("\n")
    if done.returncode:
        raise WrongError(f"{options}, extra {extra}: ended with {done.returncode}: {said[-300:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if int(peak) > result["budget"]:
        raise WrongError(f"{options}: peak {peak} above the budget {result['budget']}")
    if abs(result["peak"] - int(peak)) > 0.05 * int(peak):
        raise WrongError(f"{options}: the report says a peak of {result['peak']}, the kernel {peak}")
    case.counts["in a control group"] = int(group is not None)
    case.counts["at the smallest budget"] = int(extra == 0)
    return "right"


def _embedded(case: Case, precision: str) -> str:
    """The embedded model's store, converted once for the run."""
    from fate_moe import demo
    from fate_moe.store.convert import convert

    return str(convert(demo.MODEL, case.material.home.with_name(f"embedded-{precision}"), precision, solver="minmax"))


def _control_group(case: Case) -> Path | None:
    """A new group for memory; None where there may be none."""
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        if os.geteuid() == 0 and os.access(parent, os.W_OK) and (parent / "cgroup.procs").exists():
            group = parent / f"fate-torture-{os.getpid()}-{case.number}"
            group.mkdir()
            return group
    return None


def _remove(group: Path) -> None:
    try:
        group.rmdir()
    except OSError as error:
        raise WrongError(f"{group} cannot be removed: {error}") from error


def _child(job: dict[str, Any]) -> None:
    """In the group: learn the smallest budget from a refusal, set the group's limit, then load and write under it."""
    import torch

    from fate_moe.config import OffloadConfig
    from fate_moe.engine.load import build
    from fate_moe.engine.prepare import prepare
    from fate_moe.errors import BudgetError
    from tests.torture.__main__ import quiet

    quiet()
    prepared = prepare(Path(job["store"]))
    try:
        prepared.plan(OffloadConfig.from_options({**job["options"], "ram": 1 << 20}))
        raise SystemExit("one MiB was enough")
    except BudgetError as error:
        ram = error.smallest_bytes + job["extra"]
    if job["group"]:
        group = Path(job["group"])
        name = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").exists() else "memory.max"
        (group / name).write_text(str(int(ram * _SLACK)))
    config = OffloadConfig.from_options({**job["options"], "ram": ram})
    model: Any = build(prepared, prepared.plan(config), config)
    ids = torch.randint(3, 60, (1, job["tokens"]), generator=torch.Generator().manual_seed(1))
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    report = model.fate.report()
    print(json.dumps({"budget": ram, "peak": report.peak_bytes}))
    model.fate.close()


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
