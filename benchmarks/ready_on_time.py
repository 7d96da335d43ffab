"""Load on demand against prefetch, side by side: how many experts are resident after routing, and the cost.

    python -m benchmarks.ready_on_time [MODEL] [--expert-cache 25% ...] [--new-tokens 200] [--runs 5] [--plot PNG] [--json]

Every run is its own process (`fate run --json`); the predictors take turns and medians over the runs are shown. All runs write the
same text (greedy, the same prompt), so they look up the same experts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from fate_moe.registry import POLICIES, PREDICTORS
from fate_moe.units import format_bytes

Kind = tuple[str, str, str]  # expert cache, policy, predictor
COLUMNS = ("ready on time", "in flight", "from disk per token", "prefetched used", "waited per token", "tokens/s")


def measure(model: list[str], new_tokens: int, cache: str, policy: str, predictor: str) -> dict[str, float]:
    """One run: fractions of lookups, bytes and seconds per token (prompt included), decode speed."""
    command = [sys.executable, "-m", "fate_moe", "run", *model, "--json", "--no-do-sample", "--expert-cache", cache]
    command += ["--max-new-tokens", str(new_tokens), "--policy", policy, "--predictor", predictor]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    experts = result["experts"]
    lookups = experts["hits"] + experts["in_flight"] + experts["misses"]
    tokens = result["prompt_tokens"] + result["new_tokens"]
    return {
        "ready on time": experts["ready_on_time"],
        "in flight": experts["in_flight"] / lookups,
        "from disk per token": experts["bytes_read"] / tokens,
        "prefetched used": experts["prefetch_used"] / max(1, experts["prefetched"]),
        "waited per token": experts["stall_seconds"] / tokens,
        "tokens/s": result["decode_tokens_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="*", help="model and prompt, as for `fate run`; none: the embedded one")
    parser.add_argument("--expert-cache", nargs="+", default=["25%"])
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--policy", choices=POLICIES, nargs="+", default=["co-activation"])
    parser.add_argument("--predictor", choices=PREDICTORS, nargs="+", default=["none", "cross-layer", "combined"])
    parser.add_argument("--plot", type=Path, help="draw ready on time by cache size (needs matplotlib)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kinds = list(product(arguments.expert_cache, arguments.policy, arguments.predictor))
    runs: dict[Kind, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.runs):
        for kind in kinds:
            runs[kind].append(measure(arguments.model, arguments.new_tokens, *kind))
    rows = {kind: {column: median(run[column] for run in runs[kind]) for column in COLUMNS} for kind in kinds}
    if arguments.plot:
        plot(rows, arguments.plot)
    if arguments.json:
        names = ("expert_cache", "policy", "predictor")
        print(json.dumps([dict(zip(names, kind, strict=True)) | row for kind, row in rows.items()]))
    else:
        print_table(rows)


def print_table(rows: dict[Kind, dict[str, float]]) -> None:
    print("| cache, policy, predictor | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for kind, row in rows.items():
        cells = [f"{row['ready on time']:.1%}", f"{row['in flight']:.1%}", format_bytes(int(row["from disk per token"]))]
        cells += ["-" if kind[-1] == "none" else f"{row['prefetched used']:.0%}", f"{row['waited per token'] * 1e3:.2f} ms"]
        print(f"| {kind[0]}, `{kind[1]}`, `{kind[2]}` | " + " | ".join([*cells, f"{row['tokens/s']:.0f}"]) + " |")


def plot(rows: dict[Kind, dict[str, float]], path: Path) -> None:
    """Ready on time by cache size, one line per policy and predictor."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    caches = list(dict.fromkeys(cache for cache, _, _ in rows))
    for policy, predictor in dict.fromkeys((policy, predictor) for _, policy, predictor in rows):
        ready = [100 * rows[cache, policy, predictor]["ready on time"] for cache in caches]
        axes.plot([float(cache.rstrip("%")) for cache in caches], ready, marker="o", label=f"{policy}, {predictor}")
    axes.set(xlabel="experts in memory, %", ylabel="ready on time, %", ylim=(0, 100), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
