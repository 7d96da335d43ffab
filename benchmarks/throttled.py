"""Law 3 by real runs: the default beside `none` behind links of known speeds.

    python -m benchmarks.throttled [MODEL] [--gbps 0.3 1.2 3.5 12] [--expert-cache 25%] [--new-tokens 200] [--runs 3]

The experts' bytes are held in memory and handed out one read at a time at the link's speed, so that nothing but the link differs.
Presets take turns (`none` is the default policy without prediction); medians over the runs are shown, the last line is one JSON.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from statistics import median
from typing import Any

import torch

from fate_moe import demo
from fate_moe.config import PRESETS, OffloadConfig, format_bytes
from fate_moe.core import ExpertId
from fate_moe.memory.slots import SlotArena
from fate_moe.models import load
from fate_moe.models.generate import generate
from fate_moe.planner import make_plan
from fate_moe.store.open import Store
from fate_moe.store.reader import DiskSource


class ThrottledSource:
    """An ExpertSource from memory: one read after another, each as long as ``bytes_per_second`` says."""

    def __init__(self, store: Store, bytes_per_second: float) -> None:
        disk, room = DiskSource(store), SlotArena(1, store.manifest.slot_bytes)
        self._blobs: dict[ExpertId, bytes] = {}
        for layer, entry in enumerate(store.manifest.layers):
            for number in range(len(entry.experts)):
                expert = ExpertId(layer, number)
                self._blobs[expert] = bytes(room.view(0)[: disk.read(expert, room.view(0))])
        disk.close()
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
        """Nothing is open."""


def measure(model: str | None, preset: str, gbps: float, cache: str, new_tokens: int) -> dict[str, float]:
    """One run: decode speed, ready on time, bytes and stall per token."""
    choice = {"policy": PRESETS["best"][0], "predictor": "none"} if preset == "none" else {"preset": preset}
    config = OffloadConfig.from_options({"expert_cache": cache, "context_length": 1024, **choice})
    prepared = load.prepare(load.store_for(model, config.precision))
    source = ThrottledSource(prepared.store, gbps * 1e9)
    running = load.realize(prepared, make_plan(prepared.footprint(), config), config, source)
    tokenizer = load.load_tokenizer(prepared.store.path)
    inputs = tokenizer(demo.PROMPT, return_tensors="pt")["input_ids"]
    generate(running, tokenizer, inputs, max_new_tokens=32, do_sample=False)  # warms up
    before = running.fate.report().experts
    before = type(before)(**{name: getattr(before, name) for name in before.__dataclass_fields__})
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
    rows = []
    for gbps in arguments.gbps:
        runs: dict[str, list[dict[str, float]]] = {preset: [] for preset in arguments.preset}
        for _ in range(arguments.runs):
            for preset in arguments.preset:
                runs[preset].append(measure(arguments.model, preset, gbps, arguments.expert_cache, arguments.new_tokens))
        for preset, found in runs.items():
            row = {name: median(run[name] for run in found) for name in found[0]}
            rows.append({"gbps": gbps, "preset": preset, **row})
            print(
                f"| {gbps:g} | `{preset}` | {row['tokens_per_second']:.1f} | {row['ready_on_time']:.1%} | "
                f"{format_bytes(row['bytes_per_token'])} | {row['stall_ms_per_token']:.2f} ms |",
                flush=True,
            )
    print(json.dumps({"expert_cache": arguments.expert_cache, "rows": rows}))


if __name__ == "__main__":
    main()
