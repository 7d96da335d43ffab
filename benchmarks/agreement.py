"""The simulator compared with the engine, behind links of known speeds.

    python -m benchmarks.agreement [MODEL] --text FILE [--gbps 0.3 1.2 3.5] [--expert-cache 25% 50% 75%] [--tokens 600] [--skip 200]

Decodes the text token by token with experts that come from memory at the link's speed (throttled.py) and without statistics of
earlier runs, records it on the path that users run, and replays the recording in virtual time with the measured times, as
`fate simulate --as-recorded` does. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.throttled import ThrottledSource, blobs_of
from fate_moe.config import OffloadConfig
from fate_moe.core import ExpertId
from fate_moe.engine import prepare
from fate_moe.registry import PRESETS
from fate_moe.store.learned import STATISTICS
from fate_moe.store.open import Store
from fate_moe.tools.tracing import record_routing
from fate_moe.trace.recorded import recorded_run
from fate_moe.trace.simulate import simulate
from fate_moe.units import format_bytes

COMPARED = ("ready_on_time", "bytes_per_token", "stall_seconds", "tokens_per_second")


def compare(
    store: Store, blobs: dict[ExpertId, bytes], text: str, preset: str, gbps: float, cache: str, tokens: int, skip: int
) -> dict[str, Any]:
    """One run and its simulation: ``recorded`` and ``simulated`` of everything in COMPARED, stall in seconds over all tokens."""
    choice = {"policy": PRESETS["best"].policy, "predictor": "none"} if preset == "none" else {"preset": preset}
    config = OffloadConfig.from_options({"expert_cache": cache, "context_length": max(1024, tokens), **choice})
    (store.path / STATISTICS).unlink(missing_ok=True)
    source = ThrottledSource(blobs, gbps * 1e9)
    trace = record_routing(
        store.path,
        [text],
        config,
        new_tokens=tokens,
        max_tokens=tokens,
        teacher=True,
        router_inputs=preset != "none",
        source=source,
    )
    recorded = recorded_run(trace, skip)
    row = simulate(trace, recorded.policy, recorded.predictor, recorded.capacity, recorded.link, skip=skip)
    found = {name: {"recorded": getattr(recorded, name), "simulated": getattr(row, name)} for name in COMPARED}
    return {"preset": preset, "gbps": gbps, "expert_cache": cache, "tokens": tokens - skip, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--gbps", type=float, nargs="+", default=[0.3, 1.2, 3.5])
    parser.add_argument("--expert-cache", nargs="+", default=["25%", "50%", "75%"])
    parser.add_argument("--preset", nargs="+", choices=["none", *PRESETS], default=["none", "best"])
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--skip", type=int, default=200)
    arguments = parser.parse_args()
    text, rows = arguments.text.read_text("utf-8")[: 8 * arguments.tokens], []
    store = prepare.prepare(prepare.store_for(arguments.model, OffloadConfig().precision)).store
    blobs, statistics = blobs_of(store), store.path / STATISTICS
    before = statistics.read_bytes() if statistics.exists() else None
    print("| link | preset | resident | read per token | stall per token | tokens/s |  (recorded, simulated)")
    for gbps in arguments.gbps:
        for cache in arguments.expert_cache:
            for preset in arguments.preset:
                row = compare(store, blobs, text, preset, gbps, cache, arguments.tokens, arguments.skip)
                rows.append(row)
                read, speed = row["bytes_per_token"].values(), row["tokens_per_second"].values()
                stalls = [1e3 * seconds / row["tokens"] for seconds in row["stall_seconds"].values()]
                cells = (map(format_bytes, read), (f"{stall:.2f} ms" for stall in stalls), (f"{rate:.1f}" for rate in speed))
                print(f"| {gbps:g} GB/s | `{preset}` | {cache} | {' | '.join(', '.join(cell) for cell in cells)} |", flush=True)
    statistics.unlink(missing_ok=True)
    if before is not None:  # restore the store's statistics
        statistics.write_bytes(before)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
