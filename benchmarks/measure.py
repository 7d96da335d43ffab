"""Measures one cell of the table: a peer, variant, limit and workload, in its own process and control group."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import threading
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.limits import can_limit, drop_caches, memory_group
from benchmarks.workloads import Workload

__all__ = ["Cell", "Sample", "run_cell"]


@dataclass
class Sample:
    """A prompt, turn or batch of prompts: ``count`` tokens per prompt came in ``seconds`` after the first token.

    The engine's counters when it began (None: those of a process that had just loaded), at its first token and at its last.
    """

    prompt_tokens: int = 0
    first_seconds: float = math.nan
    count: int = 0
    seconds: float = math.nan
    counters_before: dict[str, Any] | None = None
    counters_at_first: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)


@dataclass
class Cell:
    """The result. ``outcome``: "ok", "killed" (by the limit), "slow" (stopped at the time limit; its tokens count), "failed".

    ``round``: every cell of a run is measured once a round; ``joined`` makes one of the rounds of a cell.
    """

    peer: str
    variant: str
    workload: str
    limit_bytes: int | None
    round: int = 0
    outcome: str = "failed"
    message: str = ""
    load_seconds: float = math.nan
    peak_bytes: int | None = None
    batch: int = 1
    samples: list[Sample] = field(default_factory=list)
    chosen: list[Sample] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int | None]:
        return self.peer, self.variant, self.workload, self.limit_bytes

    def measured(self) -> list[Sample]:
        """The complete samples except the first, which warms up; else those at least a quarter complete; else the first."""
        if self.chosen is not None:
            return self.chosen
        begun = [sample for sample in self.samples if not math.isnan(sample.first_seconds)]
        longest = max((sample.count for sample in begun), default=0)
        for divisor in (1, 4):
            if advanced := [sample for sample in begun[1:] if divisor * sample.count >= longest]:
                return advanced
        return begun[:1]

    @classmethod
    def joined(cls, rounds: list[Cell]) -> Cell:
        """One cell of several rounds: the samples that each of those with the best outcome counts; the highest peak."""
        ranks = ("ok", "slow", "killed", "failed")
        best = min(rounds, key=lambda cell: ranks.index(cell.outcome))
        counted = [cell for cell in rounds if cell.outcome == best.outcome]
        peaks = [cell.peak_bytes for cell in rounds if cell.peak_bytes]
        return replace(
            best,
            samples=[sample for cell in counted for sample in cell.samples],
            chosen=[sample for cell in counted for sample in cell.measured()],
            peak_bytes=max(peaks, default=None),
        )

    def decode_rates(self) -> list[float]:
        """New tokens per second of all prompts of the batch together, for each sample."""
        return [self.batch * s.count / s.seconds for s in self.measured() if s.count and s.seconds > 0]

    def first_seconds(self) -> list[float]:
        return [sample.first_seconds for sample in self.measured()]

    def prefill_rates(self) -> list[float]:
        return [self.batch * s.prompt_tokens / s.first_seconds for s in self.measured()]

    def rate(self) -> float | None:
        """The median tokens per second of the workload, prompt or new tokens; None without a sample."""
        rates = self.prefill_rates() if self.workload.startswith("prefill") else self.decode_rates()
        return median(rates) if rates else None

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["chosen"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Cell:
        return cls(**{**fields, "samples": [Sample(**sample) for sample in fields["samples"]]})


def run_cell(python: Path, worker: Path, job: dict[str, Any], cell: Cell, workload: Workload, max_seconds: float) -> Cell:
    """Run ``worker`` on ``job`` from cold caches and fill ``cell`` from its events; never raises for an error of a peer."""
    cell.batch, cell.settings = workload.batch, job["settings"]
    drop_caches()
    group_or_not = nullcontext(None) if can_limit() else memory_group(cell.limit_bytes)
    with group_or_not as group, tempfile.TemporaryFile("w+") as errors:
        command = [str(python), str(worker)]
        process = subprocess.Popen(
            group.command(command) if group else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        cut = threading.Event()

        def end() -> None:
            cut.set()
            process.kill()

        timer = threading.Timer(max_seconds, end)
        timer.start()
        try:
            _listen(process, job, cell)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        error_lines = [line for line in errors.read().splitlines() if line.strip()]
        if group:
            cell.peak_bytes = group.peak_bytes()
        if cut.is_set():
            cell.outcome = "slow"
        elif group and group.kills():
            cell.outcome = "killed"
        elif code == 0:
            cell.outcome = "ok"
        else:
            cell.outcome = "failed"
            cell.message = cell.message or (error_lines[-1][:300] if error_lines else f"exit {code}")
    return cell


def _listen(process: subprocess.Popen[str], job: dict[str, Any], cell: Cell) -> None:
    if process.stdin is None or process.stdout is None:
        return
    try:
        with process.stdin as stdin:
            json.dump(job, stdin)
    except BrokenPipeError:  # it was killed before it read; the exit code is checked
        pass
    with process.stdout as stdout:
        for line in stdout:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                continue  # a library that prints on standard output
            if isinstance(message, dict):
                _take(message, cell)


def _take(message: dict[str, Any], cell: Cell) -> None:
    """Add one event of a worker (see peers/__init__.py) to ``cell``."""
    event = message.get("event")
    if event in ("first", "tokens", "counters"):
        while len(cell.samples) <= message["sample"]:
            cell.samples.append(Sample(counters_before=cell.samples[-1].counters if cell.samples else None))
        sample = cell.samples[message["sample"]]
    if event == "loaded":
        cell.load_seconds = message["seconds"]
    elif event == "first":
        sample.prompt_tokens, sample.first_seconds = message["prompt_tokens"], message["seconds"]
        sample.counters_at_first = message.get("counters", {})
    elif event == "tokens":
        sample.count, sample.seconds = message["count"], message["seconds"]
        sample.counters = message.get("counters", sample.counters)
    elif event == "counters":
        sample.counters = message["counters"]
    elif event == "done":
        cell.versions = message.get("versions", {})
    elif event == "failed":
        cell.message = message["message"]
