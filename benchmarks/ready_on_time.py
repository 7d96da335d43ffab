"""Load on demand against prefetch, side by side: how many experts are there when the router has spoken, and what it costs.

    python -m benchmarks.ready_on_time [MODEL] [--expert-cache 25%] [--new-tokens 200] [--runs 5] [--json]

Every run is a process of its own (`fate run --json`), the predictors take turns, medians over the runs are shown. The text is the
same in all of them (greedy, the same prompt), so the lookups are too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median
from typing import Any

from fate_moe.config import POLICIES, PREDICTORS, format_bytes

COLUMNS = ("ready on time", "in flight", "from disk per token", "prefetched used", "waited per token", "tokens/s")


def measure(model: list[str], cache: str, new_tokens: int, policy: str, predictor: str) -> dict[str, float]:
    """One run: shares of lookups, bytes and seconds per token (prompt included), decode speed."""
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
    parser.add_argument("--expert-cache", default="25%")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--policy", choices=POLICIES, nargs="+", default=["shallow-arc"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kinds = [(policy, predictor) for policy in arguments.policy for predictor in PREDICTORS]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.runs):
        for kind in kinds:
            runs[kind].append(measure(arguments.model, arguments.expert_cache, arguments.new_tokens, *kind))
    rows = {kind: {column: median(run[column] for run in runs[kind]) for column in COLUMNS} for kind in kinds}
    if arguments.json:
        print(json.dumps([{"policy": policy, "predictor": predictor, **row} for (policy, predictor), row in rows.items()]))
        return
    print("| policy, predictor | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for (policy, predictor), row in rows.items():
        cells = [f"{row['ready on time']:.1%}", f"{row['in flight']:.1%}", format_bytes(int(row["from disk per token"]))]
        cells += ["-" if predictor == "none" else f"{row['prefetched used']:.0%}", f"{row['waited per token'] * 1e3:.2f} ms"]
        print(f"| `{policy}`, `{predictor}` | " + " | ".join([*cells, f"{row['tokens/s']:.0f}"]) + " |")


if __name__ == "__main__":
    main()
