"""What speculation gives and costs: tokens/s without drafts, with those that the gate takes, and with k at once.

    python -m benchmarks.speculation --expert-cache 52%

One model, one request at a time, greedy unless ``--temperature`` says otherwise. In each round every workload is answered by all
settings one after the other, so that all see the same machine; the first round warms up and does not count. "beside off" is the
median over the rounds of a setting's tokens/s beside those of "off" in the same round. "accepted" is by position: how often a draft
was right if those before it were. The text must be the same in every cell. ``--seconds`` ends the run after the cell that is under
way. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import fate_moe
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.request import Finished, Piece, Request, Sampling
from fate_moe.schedule.speculation import Mode, Speculation
from fate_moe.serve.card import ModelCard
from fate_moe.serve.constraint import constraint, json_grammar
from fate_moe.tools.tokens import chat_text

__all__ = ["SETTINGS", "WORKLOADS", "Cell", "measure"]

_FILE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius * shape.radius
    if shape.kind == "square":
        return shape.side * shape.side
    if shape.kind == "rectangle":
        return shape.width * shape.height
    raise ValueError(shape.kind)


def total_area(shapes):
    total = 0.0
    for shape in shapes:
        total += area(shape)
    return total
"""
_TEXT = """The harbour master wrote: "The north light has not been lit since the storm of the ninth." The keeper answered: "The lamp
was broken by the storm, and no glass has come from the mainland." The council decided that a boat should bring the glass, and that
the keeper should be paid for the nights in which he had rowed out with a lantern."""
_PEOPLE = {"type": "array", "minItems": 3, "maxItems": 3, "items": {"type": "object", "properties": {
    "first_name": {"type": "string", "maxLength": 12}, "profession": {"enum": ["keeper", "captain", "carpenter"]},
    "years_of_service": {"type": "integer", "minimum": 1, "maximum": 40}, "is_retired": {"type": "boolean"},
}, "required": ["first_name", "profession", "years_of_service", "is_retired"], "additionalProperties": False}}  # fmt: skip
# A question, how a model without a chat template is led to answer it, and the schema of the answer.
WORKLOADS: dict[str, tuple[str, str, Any]] = {
    "code edit": (f"Rename `shape` to `figure` in this file and repeat it whole:\n\n{_FILE}", "```python\n", None),
    "summary": (f"Summarize this and quote what was said:\n\n{_TEXT}", 'Summary: The harbour master wrote: "The', None),
    "chat": ("Tell me about the life of a lighthouse keeper.", "The lighthouse keeper lived", None),
    "json": ("Three people of a small harbour as JSON.", "", _PEOPLE),
}
SETTINGS: dict[str, tuple[Mode, int]] = {"off": ("off", 8), "auto": ("auto", 8)}
SETTINGS |= {str(most): ("lookup", most) for most in (1, 2, 4, 8)}


class _Recorded(Speculation):
    """Writes down of each pass with one text how many tokens were drafted and accepted."""

    def __init__(self, mode: Mode, most: int) -> None:
        super().__init__(mode, most)
        self.passes = list[tuple[int, int]]()

    def passed(self, accepted: Sequence[int]) -> None:
        """See Speculation."""
        if self._began is not None:
            self.passes.append((self._drafted[0], accepted[0]))
        super().passed(accepted)


@dataclass
class Cell:
    """By round tokens/s, CPU milliseconds and bytes of experts a token; of all rounds the passes and what they drafted."""

    tokens_per_second: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    read_bytes: list[float] = field(default_factory=list)
    passes: list[tuple[int, int]] = field(default_factory=list)

    def accepted(self) -> list[float]:
        """By position, rounded."""
        found = list[float]()
        for position in range(8):
            tried = [kept for drafted, kept in self.passes if drafted > position and kept >= position]
            if tried:
                found.append(round(sum(kept > position for kept in tried) / len(tried), 2))
        return found

    def summary(self, off: Cell | None) -> dict[str, Any]:
        """Medians; ``off``: the cell of the same workload without drafts."""
        pairs = zip(self.tokens_per_second, off.tokens_per_second if off else [], strict=False)
        beside = [mine / its for mine, its in pairs]
        return {
            "tokens_per_second": round(statistics.median(self.tokens_per_second), 2),
            "beside_off": round(statistics.median(beside), 3) if beside else None,
            "cpu_ms_per_token": round(statistics.median(self.cpu_ms), 2),
            "bytes_per_token": round(statistics.fmean(self.read_bytes)),
            "drafted": sum(drafted for drafted, _ in self.passes),
            "kept": sum(kept for _, kept in self.passes),
            "accepted": self.accepted(),
            "rounds": len(self.tokens_per_second),
        }


def measure(
    loaded: tuple[Any, Any],
    settings: Sequence[str],
    workloads: Sequence[str],
    tokens: int,
    rounds: int,
    seconds: float = float("inf"),
    temperature: float = 0.0,
) -> dict[str, dict[str, Cell]]:
    """By workload and setting, what was measured in ``seconds``. Raises RuntimeError where a text is not that of the others."""
    until = time.monotonic() + seconds
    speculations = {name: _Recorded(*SETTINGS[name]) for name in settings}
    schedulers = {name: BatchScheduler(lambda: loaded, parallel=1, speculation=of) for name, of in speculations.items()}
    requests = {workload: _request(*loaded, workload, tokens, temperature) for workload in workloads}
    found = {workload: {name: Cell() for name in settings} for workload in workloads}
    texts: dict[str, str] = {}
    try:
        for number in range(rounds + 1):
            for workload, request in requests.items():
                for name in settings if number % 2 == 0 else reversed(settings):
                    if time.monotonic() > until:
                        return found
                    cell, speculation, cpu = found[workload][name], speculations[name], time.process_time()
                    speculation.passes.clear()
                    text, end = asyncio.run(_answer(schedulers[name], request))
                    if texts.setdefault(workload, text) != text:
                        raise RuntimeError(f"{workload}: {name} wrote another text: {text!r}, not {texts[workload]!r}")
                    if number:
                        count = end.usage.completion_tokens
                        cell.tokens_per_second.append(end.timings.decode_tokens_per_second)
                        cell.cpu_ms.append((time.process_time() - cpu) / count * 1e3)
                        cell.read_bytes.append(end.timings.bytes_read / count)
                        cell.passes += speculation.passes
    finally:
        for scheduler in schedulers.values():
            scheduler.close()
    return found


def _request(model: Any, tokenizer: Any, workload: str, tokens: int, temperature: float) -> Request:
    question, lead, schema = WORKLOADS[workload]
    text = chat_text(tokenizer, [{"role": "user", "content": question}]) if tokenizer.chat_template else f"{question}\n\n"
    prompt = tuple(tokenizer(text + lead)["input_ids"])
    card = ModelCard.of("benchmark", model, tokenizer)
    made = constraint(card, json_grammar(schema), len(prompt), "schema") if schema else None
    # A penalty on repeating would be one on what is drafted.
    sampling = Sampling(temperature, repetition_penalty=1.0, seed=3)
    return Request(prompt, tokens, sampling, ignore_eos=schema is None, constraint=made)


async def _answer(scheduler: BatchScheduler, request: Request) -> tuple[str, Finished]:
    events = [event async for events in scheduler.submit(request) for event in events]
    end = events[-1]
    assert isinstance(end, Finished)
    if end.reason == "error":
        raise RuntimeError(end.message)
    return "".join(event.text for event in events if isinstance(event, Piece)), end


def _names(known: Sequence[str], text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
    return names


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a store; default: the embedded model")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--expert-cache", help="a size or percentage; default: all experts")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; default: greedy")
    for name, known in (("settings", list(SETTINGS)), ("workloads", list(WORKLOADS))):
        parser.add_argument(f"--{name}", default=known, type=partial(_names, known), help=f"of {','.join(known)}; default: all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell afterwards")
    parser.add_argument("--threads", type=int, help="of torch; default: its own")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    loaded = fate_moe.load(arguments.model, precision=arguments.precision, expert_cache=arguments.expert_cache, context_length=1024)
    left = arguments.seconds - (time.monotonic() - began)
    found = measure(
        loaded, arguments.settings, arguments.workloads, arguments.tokens, arguments.rounds, left, arguments.temperature
    )
    facts: dict[str, Any] = {}
    for workload, cells in found.items():
        print(workload)
        facts[workload] = {}
        for name, cell in cells.items():
            if not cell.tokens_per_second:
                continue
            one = facts[workload][name] = cell.summary(cells.get("off"))
            beside = f"{one['beside_off']:6.3f}" if one["beside_off"] is not None else ""
            print(
                f"  {name:5s}{one['tokens_per_second']:8.2f} tokens/s{beside} beside off, {one['cpu_ms_per_token']:7.2f} CPU ms, "
                f"{one['bytes_per_token'] / 2**20:7.2f} MiB a token, kept {one['kept']} of {one['drafted']} {one['accepted']}"
            )
    run = {"model": arguments.model or "embedded", "expert_cache": arguments.expert_cache or "100%", "tokens": arguments.tokens}
    print(json.dumps({**run, "seconds": round(time.monotonic() - began, 1), "cells": facts}))
    loaded[0].fate.close()


if __name__ == "__main__":
    main()
