"""Checks "never slower than not trying" in real runs: the default against `none` over links of known speeds.

    python -m benchmarks.throttled [MODEL] [--gbps 0.3 1.2 3.5 12] [--expert-cache 25%] [--new-tokens 200] [--runs 3]

The experts' bytes are held in memory and returned one read at a time at the link's speed, so that only the link differs. Each run
loads the model anew and decodes 32 tokens before those that are measured. Presets take turns, each first equally often (`none` is
the default policy without prediction). Shown are medians over the runs, and the speed relative to the first preset of the same
round: median, minimum and maximum. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fate_moe import demo
from fate_moe.config import OffloadConfig
from fate_moe.core import ExpertId
from fate_moe.engine import load, prepare
from fate_moe.engine.budget import make_plan
from fate_moe.memory.slots import SlotArena
from fate_moe.registry import PRESETS
from fate_moe.store.open import Store
from fate_moe.store.reader import DiskSource
from fate_moe.tools.generate import generate
from fate_moe.units import format_bytes


def blobs_of(store: Store) -> dict[ExpertId, bytes]:
    """Every expert's bytes."""
    disk, arena = DiskSource(store), SlotArena((1, store.manifest.slot_bytes))
    experts = [ExpertId(layer, n) for layer, entry in enumerate(store.manifest.layers) for n in range(len(entry.experts))]
    try:
        return {expert: bytes(arena.view(0)[: disk.read(expert, arena.view(0))]) for expert in experts}
    finally:
        disk.close()


class ThrottledSource:
    """An ExpertSource from memory: one read after another, each at ``bytes_per_second``."""

    def __init__(self, blobs: dict[ExpertId, bytes], bytes_per_second: float) -> None:
        self._blobs = blobs
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free = 0.0

    def read(self, expert: ExpertId, slot: memoryview, *sections: Any) -> int:
        """Wait for the link, then copy."""
        blob = self._blobs[expert]
        with self._lock:
            self._free = max(self._free, time.perf_counter()) + len(blob) / self._bytes_per_second
            until = self._free
        slot[: len(blob)] = blob
        while (left := until - time.perf_counter()) > 0:
            time.sleep(left)
        return len(blob)

    def close(self) -> None:
        """Nothing to close."""


def measure(path: Path, blobs: dict[ExpertId, bytes], preset: str, gbps: float, cache: str, new_tokens: int) -> dict[str, float]:
    """One run of the store at ``path``: decode speed, ready on time, bytes and stall per token."""
    choice = {"policy": PRESETS["best"].policy, "predictor": "none"} if preset == "none" else {"preset": preset}
    config = OffloadConfig.from_options({"expert_cache": cache, "context_length": 1024, **choice})
    prepared = prepare.prepare(path)
    source = ThrottledSource(blobs, gbps * 1e9)
    running = load.build(prepared, make_plan(prepared.footprint(), config), config, source)
    tokenizer = prepare.load_tokenizer(prepared.store.path)
    inputs = tokenizer(demo.PROMPT, return_tensors="pt")["input_ids"]
    generate(running, tokenizer, inputs, max_new_tokens=32, do_sample=False)  # warms up
    before = running.fate.report().experts
    torch.manual_seed(0)
    answer = generate(running, tokenizer, inputs, max_new_tokens=new_tokens, do_sample=False, min_new_tokens=new_tokens)
    spent = running.fate.report().experts.since(before)
    running.fate.close()
    return {
        "tokens_per_second": answer.decode_tokens_per_second,
        "ready_on_time": spent.ready_on_time,
        "bytes_per_token": spent.bytes_read / new_tokens,
        "stall_ms_per_token": 1e3 * spent.stall_seconds / new_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--gbps", type=float, nargs="+", default=[0.3, 1.2, 3.5, 12.0])
    parser.add_argument("--expert-cache", default="25%")
    parser.add_argument("--preset", nargs="+", choices=["none", *PRESETS], default=["none", "best"])
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    path = prepare.store_for(arguments.model, OffloadConfig().precision)
    blobs, rows = blobs_of(prepare.prepare(path).store), []
    for gbps in arguments.gbps:
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(arguments.runs):
            order = arguments.preset[:: -1 if number % 2 else 1]
            rounds.append({p: measure(path, blobs, p, gbps, arguments.expert_cache, arguments.new_tokens) for p in order})
        first = arguments.preset[0]
        for preset in arguments.preset:
            row = {name: median(results[preset][name] for results in rounds) for name in rounds[0][preset]}
            speeds = [results[preset]["tokens_per_second"] / results[first]["tokens_per_second"] for results in rounds]
            relative = {"relative_speed": median(speeds), "min": min(speeds), "max": max(speeds)}
            rows.append({"gbps": gbps, "preset": preset, **row, **relative})
            print(
                f"| {gbps:g} GB/s | `{preset}` | {row['tokens_per_second']:.1f} | {row['ready_on_time']:.1%} | "
                f"{format_bytes(row['bytes_per_token'])} | {row['stall_ms_per_token']:.2f} ms | "
                f"{relative['relative_speed']:.3f} ({relative['min']:.3f}-{relative['max']:.3f}) |",
                flush=True,
            )
    print(json.dumps({"expert_cache": arguments.expert_cache, "rows": rows}))


if __name__ == "__main__":
    main()
