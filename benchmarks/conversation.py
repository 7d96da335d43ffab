"""Time to first token in a conversation of ten turns behind a long prefix, as coding agents have it; what int8 keys cost and gain.

    python -m benchmarks.conversation OUT.json [--cells kept without perplexity slots llama llama-without] [--model MODEL]
        [--prefix 16384] [--text FILE] [--precision int4] [--kv-cache bf16 int8] [--turns 10] [--without-turns 2] [--ram 4GiB]
        [--peer VENV --gguf FILE]

Each cell runs in a process of its own; those that OUT.json has are not run again.

    kept           prefixes kept in RAM and on the disk: every turn, the last one again after a restart, and decode behind it
    without        nothing kept: the first turns, of which each reads all
    perplexity     of so many tokens in one window
    slots          expert slots and peak memory under --ram
    llama          llama.cpp's server (xllamacpp, in the environment VENV) on FILE, with its prompt cache
    llama-without  as without

The prefix and the questions are FILE, or this repository's documentation. A prefix beyond what the model was made for is read with
its rotary embedding stretched (yarn); llama.cpp is told the longer context alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import processor_facts
from fate_moe.adapter.config_rules import longest_context
from fate_moe.config import OffloadConfig
from fate_moe.engine.load import build
from fate_moe.engine.prepare import load_tokenizer, prepare, store_for
from fate_moe.machine import peak_memory
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.request import Finished, Piece, Request, Sampling
from fate_moe.switches import cache_home
from fate_moe.tools.evaluate import perplexity
from fate_moe.tools.tokens import token_ids

__all__ = ["Job", "Talk", "kept", "llama", "long_gguf", "slots", "stretched", "without"]

_ASKED, _ANSWERED, _DECODED = 24, 8, 48  # tokens of a question, of an answer, and of the answer whose speed is measured
_CELLS = ("kept", "without", "perplexity", "slots", "llama", "llama-without")


@dataclass(frozen=True)
class Job:
    """What a cell runs on: a store and ``text``, of which the first ``num_prefix`` tokens are the prefix."""

    store: Path
    text: list[int]
    num_prefix: int
    turns: int = 10
    without_turns: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    python: str = ""  # of llama.cpp's environment
    gguf: Path = Path()

    @property
    def context(self) -> int:
        """Tokens that all turns take."""
        return self.num_prefix + self.turns * (_ASKED + _ANSWERED) + _DECODED + 64

    def asked(self, turn: int) -> list[int]:
        first = self.num_prefix + turn * _ASKED
        return self.text[first : first + _ASKED]


class Talk:
    """A conversation with a model that is loaded for it: ``ids`` are all tokens so far."""

    def __init__(self, job: Job, ids: Sequence[int], **options: Any) -> None:
        began, prepared = time.perf_counter(), prepare(job.store)
        config = OffloadConfig(**job.options, **options, context_length=job.context)
        self.model, tokenizer = build(prepared, prepared.plan(config), config), load_tokenizer(job.store)
        self.scheduler = BatchScheduler(lambda: (self.model, tokenizer), parallel=1)
        self.load_ms = _ms(time.perf_counter() - began)
        self.ids = list(ids)

    def turn(self, asked: Sequence[int], most: int = _ANSWERED) -> Finished:
        """Ask, and add the answer of ``most`` tokens."""
        self.ids += asked
        return asyncio.run(self._answer(Request(tuple(self.ids), most, Sampling(temperature=0), ignore_eos=True)))

    async def _answer(self, request: Request) -> Finished:
        async for events in self.scheduler.submit(request):
            for event in events:
                if isinstance(event, Piece):
                    self.ids += [record.token for record in event.tokens]
        assert isinstance(event, Finished)
        if event.reason != "length":
            raise RuntimeError(f"the answer ended with {event.reason}: {event.message}")
        return event

    def close(self) -> None:
        self.scheduler.close()
        self.model.fate.close()


def kept(job: Job) -> dict[str, Any]:
    """Every turn, then the model loaded anew for the last one, which has to give the same tokens."""
    options = {"prefix_cache": "100%", "prefix_cache_disk": "16GiB"}
    talk = Talk(job, job.text[: job.num_prefix], **options)
    answers = [talk.turn(job.asked(turn)) for turn in range(job.turns - 1)]
    before = list(talk.ids)
    answers.append(talk.turn(job.asked(job.turns - 1)))
    found, said = {"load_ms": talk.load_ms, **_turns(answers)}, list(talk.ids)
    began = time.perf_counter()
    talk.close()
    found |= {"close_ms": _ms(time.perf_counter() - began), "disk_bytes": talk.scheduler.load.prefixes.disk_bytes}
    talk = Talk(job, before, **options)
    again = talk.turn(job.asked(job.turns - 1))
    found |= {"restart_load_ms": talk.load_ms, **{f"restart_{name}": value[0] for name, value in _turns([again]).items()}}
    if talk.ids != said:
        raise RuntimeError("the texts differ")
    longer = talk.turn([], _DECODED)
    found |= {"decode_ms": _ms(1 / longer.timings.decode_tokens_per_second), "peak_bytes": peak_memory()}
    talk.close()
    return found


def without(job: Job) -> dict[str, Any]:
    """The first turns, nothing kept."""
    talk = Talk(job, job.text[: job.num_prefix], prefix_cache="off")
    found = {"load_ms": talk.load_ms, **_turns([talk.turn(job.asked(turn)) for turn in range(job.without_turns)])}
    talk.close()
    return found


def _perplexity(job: Job) -> dict[str, Any]:
    talk = Talk(job, [])
    with torch.inference_mode():
        made = perplexity(talk.model, torch.tensor(job.text[: job.num_prefix]), window=job.num_prefix)
    talk.close()
    return {"perplexity": made.perplexity, "tokens": made.tokens, "seconds": round(made.seconds, 1)}


def slots(job: Job) -> dict[str, Any]:
    """What the plan gives, and what the process took once the prefix was read."""
    talk = Talk(job, job.text[: job.num_prefix], prefix_cache_disk="off")
    talk.turn(job.asked(0))
    plan, counters = talk.model.fate.plan, talk.model.fate.counters()
    found = {"slots": plan.num_slots, "experts": plan.num_experts, "kv_cache_bytes": plan.kv_cache_bytes}
    found |= {"budget_bytes": plan.budget_bytes, "peak_bytes": peak_memory(), "bytes_read": counters.bytes_read}
    talk.close()
    return found


def llama(job: Job, is_cached: bool = True) -> dict[str, Any]:
    """llama.cpp's server in a process of its own, which takes token ids. Answers are its own."""
    history, samples = job.text[: job.num_prefix], list[list[list[int]]]()
    for turn in range(job.turns if is_cached else job.without_turns):
        history = [*history, *job.asked(turn)]
        samples.append([history if turn == 0 or not is_cached else job.asked(turn)])
        history += job.text[:_ANSWERED]  # as long as an answer
    facts = {"engine": "xllamacpp", "mmap": True, "repack": True}
    asked = {"model": str(long_gguf(job.gguf, job.context)), "settings": facts, "samples": samples, "new_tokens": _ANSWERED}
    asked |= {"workload": "chat" if is_cached else "prompts", "threads": torch.get_num_threads(), "context_tokens": job.context}
    worker = Path(__file__).parent / "peers" / "llama_worker.py"
    done = subprocess.run([job.python, str(worker)], input=json.dumps(asked), capture_output=True, text=True, check=False)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [event["message"] for event in events if event["event"] == "failed"]
    if failed or not events or events[-1]["event"] != "done":
        raise RuntimeError(f"llama.cpp failed: {failed or done.stderr[-500:]}")
    first = [_ms(event["seconds"]) for event in events if event["event"] == "first"]
    return {"load_ms": _ms(events[0]["seconds"]), "first_ms": first, "versions": events[-1]["versions"]}


def _llama_without(job: Job) -> dict[str, Any]:
    return llama(job, is_cached=False)


def long_gguf(file: Path, tokens: int) -> Path:
    """``file``, or a copy beside it that says it was made for so many tokens: the server takes no more."""
    import gguf

    made = file.with_name(f"{file.stem}-{tokens}.gguf")
    name = str(gguf.GGUFReader(file).fields["general.architecture"].contents()) + ".context_length"
    if int(gguf.GGUFReader(file).fields[name].contents()) >= tokens:
        return file
    if not made.exists():
        unfinished = made.with_suffix(".partial")
        shutil.copyfile(file, unfinished)
        length = gguf.GGUFReader(unfinished, "r+").fields[name]
        length.parts[length.data[0]][0] = tokens
        unfinished.rename(made)
    return made


@contextmanager
def stretched(store: Path, tokens: int) -> Iterator[Path]:
    """``store``, or one beside it of the same files whose model was made for ``tokens``, with yarn."""
    config = json.loads((store / "config.json").read_text())
    longest = longest_context(prepare(store).model.config)
    if longest is None or longest >= tokens:
        yield store
        return
    rope = {"rope_theta": config.pop("rope_theta", 10000.0), **(config.pop("rope_scaling", None) or {})}
    rope |= {**(config.get("rope_parameters") or {}), "rope_type": "yarn", "factor": float(-(-tokens // longest))}
    config |= {"rope_parameters": {**rope, "original_max_position_embeddings": longest}}
    with tempfile.TemporaryDirectory(dir=store.resolve().parent) as folder:
        for file in store.iterdir():
            if file.is_file() and file.name != "config.json":
                os.link(file.resolve(), Path(folder) / file.name)
        (Path(folder) / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest * int(rope["factor"])}))
        yield Path(folder)


def _turns(ends: Sequence[Finished]) -> dict[str, Any]:
    first = [_ms(end.timings.queued_seconds + end.timings.prompt_seconds) for end in ends]
    return {"first_ms": first, "cached_tokens": [end.usage.cached_tokens for end in ends]}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


_RUNS = dict(zip(_CELLS, (kept, without, _perplexity, slots, llama, _llama_without), strict=True))


def _run(cell: str, job: Job) -> dict[str, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    found = _RUNS[cell](job)
    return {**found, "wall_seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}


def _in_its_own_process(cell: str, job: Job) -> dict[str, Any]:
    """With a home of its own, so that nothing of earlier runs is on the disk."""
    stores, before = cache_home() / "stores", os.environ.get("FATE_HOME")
    with tempfile.TemporaryDirectory(dir=stores.resolve().parent) as folder:
        (Path(folder) / "stores").symlink_to(stores)
        os.environ["FATE_HOME"] = folder
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                return alone.submit(_run, cell, job).result()
        finally:
            os.environ.pop("FATE_HOME")
            if before is not None:
                os.environ["FATE_HOME"] = before


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", nargs="+", choices=_CELLS, default=["kept", "without"])
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--prefix", type=int, default=16384, help="tokens of the prefix; of perplexity, of the window")
    parser.add_argument("--text", type=Path, help="default: this repository's documentation")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--kv-cache", nargs="+", choices=("bf16", "int8"), default=["bf16"])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--without-turns", type=int, default=2)
    parser.add_argument("--ram", help="budget of the cell slots, and of the others of fate-moe if given")
    parser.add_argument("--peer", type=Path, help="folder of a virtual environment with xllamacpp")
    parser.add_argument("--gguf", type=Path)
    given = parser.parse_args()
    found = json.loads(given.out.read_text()) if given.out.exists() else {"machine": processor_facts(), "cells": {}}
    store = store_for(given.model, given.precision)
    needed = given.prefix + given.turns * (_ASKED + _ANSWERED) + _DECODED + 64
    files = [given.text] if given.text else sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    words = "\n".join(file.read_text() for file in files)[: 8 * needed]
    text = token_ids(load_tokenizer(store), words, prepare(store).model.config.vocab_size)
    if len(text) < needed:
        parser.error(f"the text has {len(text)} tokens, and {needed} are needed; give a longer --text")
    python = str(given.peer / "bin" / "python") if given.peer else ""
    with stretched(store, needed) as used:
        for cell in given.cells:
            of_llama = cell.startswith("llama")
            for kv_cache in given.kv_cache[:1] if of_llama else given.kv_cache:
                model = given.gguf.stem if of_llama and given.gguf else f"{given.model or 'embedded'} {given.precision} {kv_cache}"
                name = f"{Path(model).name} {given.prefix} {cell}" + (f" {given.ram}" if given.ram else "")
                if name in found["cells"]:
                    continue
                options = {"kv_cache": kv_cache, **({"ram": given.ram} if given.ram else {})}
                job = Job(used, text, given.prefix, given.turns, given.without_turns, options, python, given.gguf or Path())
                found["cells"][name] = _in_its_own_process(cell, job)
                given.out.write_text(json.dumps(found, indent=1) + "\n")
                print(name, json.dumps(found["cells"][name]), flush=True)


if __name__ == "__main__":
    main()
