"""One run: every cell is measured once a round, the cells of a round in an order drawn for it, so that engines take turns."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from benchmarks.facts import machine_facts, processor_facts
from benchmarks.measure import Cell, run_cell
from benchmarks.peers import Peer, Variant
from benchmarks.report import cell_text, limit_name
from benchmarks.results import ModelFacts, Results, code_state
from benchmarks.workloads import Workload, context_tokens, samples

__all__ = ["Planned", "add_options", "begin_or_continue", "run_rounds", "shuffled"]


@dataclass(frozen=True)
class Planned:
    """A cell that is to be measured, by which peer (with its interpreter and its copy of the model) and with which settings."""

    peer: Peer
    python: Path
    model: Path
    variant: Variant
    workload: Workload
    limit_bytes: int | None


def begin_or_continue(file: Path, facts: ModelFacts, arguments: argparse.Namespace) -> Results:
    """The results in ``file``, or none yet with what this machine is (the disk is measured by reading the checkpoint).

    ``arguments`` are those of ``add_options``. Raises ValueError if the file is of another model, processor or state of the code.
    """
    if file.exists():
        results = Results.load(file)
        results.refuse_others(facts, processor_facts(), code_state())
        return results
    file.parent.mkdir(parents=True, exist_ok=True)
    largest = max(arguments.checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    run = {"date": date.today().isoformat(), "cell_seconds": arguments.seconds}
    return Results(facts, machine_facts(largest, arguments.threads) | run, code=code_state())


def shuffled(planned: Sequence[Planned], number: int) -> list[Planned]:
    """The order of round ``number``: the same whenever a run is continued."""
    return random.Random(number).sample(planned, len(planned))


def add_options(verb: argparse.ArgumentParser, default_file: str) -> None:
    """What every run asks for; ``default_file`` is where its results go."""
    verb.add_argument("checkpoint", type=Path, help="a Hugging Face checkpoint folder")
    verb.add_argument("--home", type=Path, required=True, help="folder for environments, stores and GGUF files, which are large")
    verb.add_argument("--results", type=Path, help=f"result file, continued if it exists; default: {default_file}")
    verb.add_argument("--tokenizer", type=Path, help="folder of the tokenizer; default: the checkpoint")
    verb.add_argument("--rounds", type=int, default=3, help="how often each cell is measured")
    verb.add_argument("--threads", type=int, default=2)
    verb.add_argument("--seconds", type=float, default=240, help="time limit of a cell")


def run_rounds(planned: Sequence[Planned], results: Results, file: Path, arguments: argparse.Namespace) -> None:
    """Measure what ``results`` lack, each cell in its own process, and write them to ``file`` after each.

    ``arguments`` are those of ``add_options``. Raises ValueError if the code changes meanwhile.
    """
    console = Console(stderr=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.checkpoint)
    vocab_size = AutoConfig.from_pretrained(arguments.checkpoint).get_text_config().vocab_size
    for number in range(arguments.rounds):
        for job in shuffled(planned, number):
            cell = Cell(job.peer.name, job.variant.name, job.workload.name, job.limit_bytes, number)
            if results.has(cell.key, number):
                continue
            if code_state() != results.code:
                raise ValueError("the code changed while it was measured; start again with an empty result file")
            prompts = samples(job.workload, tokenizer, vocab_size)
            settings: dict[str, Any] = {
                "model": str(job.model),
                "workload": job.workload.kind,
                "samples": prompts,
                "new_tokens": job.workload.new_tokens,
                "context_tokens": context_tokens(job.workload, prompts),
                "threads": arguments.threads,
                "limit_bytes": job.limit_bytes,
                "settings": job.variant.settings,
                "scratch": str(arguments.home / "scratch" / arguments.checkpoint.name),
            }
            run_cell(job.python, job.peer.worker, settings, cell, job.workload, arguments.seconds)
            results.add(cell)
            results.save(file)
            label = f"{limit_name(job.limit_bytes)}, {job.workload.name}, {job.peer.name} {job.variant.name}".rstrip()
            console.print(f"{number + 1}/{arguments.rounds} {label}: {cell_text(cell)} {cell.message}", highlight=False)
