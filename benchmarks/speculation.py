"""What speculation gives and costs: tokens/s of a scheduler without drafts, with those that the gate takes, and with k at once.

    python -m benchmarks.speculation --expert-cache 52%

The embedded model, one request at a time, greedy but for "surprises", where drafts are seldom right. Each workload is answered in
turn by all settings, so that all see the same machine; medians over the rounds. The text must be the same in every cell. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

import fate_moe
from fate_moe.core import Drafts
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.request import Finished, Piece, Request, Sampling
from fate_moe.schedule.speculation import Speculation

__all__ = ["Cell", "measure"]

_FILE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius * shape.radius
    if shape.kind == "square":
        return shape.side * shape.side
    raise ValueError(shape.kind)
"""
WORKLOADS = {
    "code edit": _FILE + "\n# The same file, with a triangle:\n\n" + _FILE[: _FILE.index('    if shape.kind == "square"')],
    "repeated text": "The captain looked at the sea. The sea was calm, and the captain looked at the sky. " * 4,
    "chat": "User: Tell me about the lighthouse keeper.\nAssistant: The lighthouse keeper lived",
    "surprises": "Once upon a time",
}


@dataclass(frozen=True)
class Cell:
    """Medians; ``accepted`` of ``drafted`` tokens over all rounds, ``bytes_per_token`` of experts."""

    tokens_per_second: float
    cpu_ms_per_token: float
    drafted: int
    accepted: int
    bytes_per_token: float


def measure(model: Any, tokenizer: Any, settings: dict[str, Speculation], tokens: int, rounds: int) -> dict[str, dict[str, Cell]]:
    """By workload and setting. Raises RuntimeError where a text is not that of the others."""
    schedulers = {
        name: BatchScheduler(lambda: (model, tokenizer), parallel=1, speculation=speculation)
        for name, speculation in settings.items()
    }
    found: dict[str, dict[str, Cell]] = {}
    try:
        for workload, text in WORKLOADS.items():
            # A penalty on repeating would be one on what is drafted.
            temperature = 1.2 if workload == "surprises" else 0.0
            request = Request(
                tuple(tokenizer(text)["input_ids"]), tokens, Sampling(temperature, repetition_penalty=1.0, seed=1), ignore_eos=True
            )
            times, costs, reads = ({name: list[float]() for name in settings} for _ in range(3))
            texts = {name: list[str]() for name in settings}
            drafts = {name: Drafts() for name in settings}
            for number in range(rounds + 1):
                for name, scheduler in schedulers.items():
                    cpu, before = time.process_time(), model.fate.report().drafts
                    text, end = asyncio.run(_answer(scheduler, request))
                    if number:  # the first one fills caches
                        times[name].append(end.timings.decode_tokens_per_second)
                        costs[name].append((time.process_time() - cpu) / tokens * 1e3)
                        reads[name].append(end.timings.bytes_read / tokens)
                    after = model.fate.report().drafts
                    drafts[name].drafted += after.drafted - before.drafted
                    drafts[name].accepted += after.accepted - before.accepted
                    texts[name].append(text)
            if len({text for of in texts.values() for text in of}) > 1:
                raise RuntimeError(f"{workload}: the texts differ")
            found[workload] = {
                name: Cell(
                    round(statistics.median(times[name]), 2),
                    round(statistics.median(costs[name]), 2),
                    drafts[name].drafted,
                    drafts[name].accepted,
                    round(statistics.fmean(reads[name])),
                )
                for name in settings
            }
    finally:
        for scheduler in schedulers.values():
            scheduler.close()
    return found


async def _answer(scheduler: BatchScheduler, request: Request) -> tuple[str, Finished]:
    events = [event async for events in scheduler.submit(request) for event in events]
    end = events[-1]
    assert isinstance(end, Finished)
    return "".join(event.text for event in events if isinstance(event, Piece)), end


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a store; default: the embedded model")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--expert-cache", help="a size or percentage; default: all experts")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pair", action="store_true", help="off and auto alone")
    parser.add_argument("--threads", type=int, help="of torch; default: its own")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = fate_moe.load(
        arguments.model, precision=arguments.precision, expert_cache=arguments.expert_cache, context_length=1024
    )
    settings = {"off": Speculation("off"), "auto": Speculation("auto")}
    if not arguments.pair:
        settings |= {f"k = {most}": Speculation("lookup", most) for most in (1, 2, 4, 8)}
    found = measure(model, tokenizer, settings, arguments.tokens, arguments.rounds)
    for workload, cells in found.items():
        print(workload)
        for name, cell in cells.items():
            print(f"  {name:6s} {cell}")
    print(json.dumps({workload: {name: cell.__dict__ for name, cell in cells.items()} for workload, cells in found.items()}))
    model.fate.close()


if __name__ == "__main__":
    main()
