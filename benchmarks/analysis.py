"""Splits a cell's time into computing, reading and waiting, and compares it with the floors of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from benchmarks.measure import Cell, Sample
from benchmarks.results import Results

__all__ = ["Cost", "Overlap", "cost", "memory_floor", "overlap", "ratio"]


@dataclass(frozen=True)
class Cost:
    """The cost of one new token, or of one prompt if the workload is prefill. None: not counted by the engine."""

    seconds: float
    read_bytes: float | None
    stall_seconds: float | None


@dataclass(frozen=True)
class Overlap:
    """The time of a token or prompt, the time to compute it with everything resident, and the time to read its bytes."""

    seconds: float
    compute_seconds: float
    read_seconds: float

    @property
    def efficiency(self) -> float:
        """1.0: the shorter of reading and computing is hidden completely behind the longer."""
        return max(self.compute_seconds, self.read_seconds) / self.seconds

    @property
    def max_speedup(self) -> float:
        """How many times faster complete overlap would be than reading and computing in turn; at most 2."""
        return (self.compute_seconds + self.read_seconds) / max(self.compute_seconds, self.read_seconds)


def memory_floor(results: Results) -> float:
    """The lower bound of seconds per decoded token with INT4 on this machine: active bytes / memory bandwidth."""
    return results.model.active_bytes / float(results.machine["memory_bytes_per_second"])


def cost(cell: Cell) -> Cost | None:
    """Medians over the measured samples; None without one."""
    prefill = cell.workload.startswith("prefill")
    units = [_prompt(sample) if prefill else _token(sample, cell.batch) for sample in cell.measured() if prefill or sample.count]
    if not units:
        return None
    reads = [unit.read_bytes for unit in units if unit.read_bytes is not None]
    stalls = [unit.stall_seconds for unit in units if unit.stall_seconds is not None]
    return Cost(median(u.seconds for u in units), median(reads) if reads else None, median(stalls) if stalls else None)


def overlap(results: Results, cell: Cell) -> Overlap | None:
    """The overlap of a cell; None if the engine counts no bytes or has no cell without a limit, which gives the compute time."""
    unlimited = next((c for c in results.joined() if c.key == (*cell.key[:3], None)), None)
    here, free = cost(cell), cost(unlimited) if unlimited else None
    if here is None or free is None or here.read_bytes is None:
        return None
    disk = results.machine["disk_bytes_per_second"]
    return Overlap(here.seconds, free.seconds - (free.stall_seconds or 0.0), here.read_bytes / disk)


def ratio(results: Results, peer: str, than: str, workload: str, limit_bytes: int | None) -> float | None:
    """How many times faster ``peer`` is than ``than``, each with its best variant; None if one of them has no result."""
    rates = [
        cell.rate() if cell and cell.outcome in ("ok", "slow") else None
        for cell in (results.best(name, workload, limit_bytes) for name in (peer, than))
    ]
    return rates[0] / rates[1] if rates[0] and rates[1] else None


def _token(sample: Sample, batch: int) -> Cost:
    tokens = sample.count * batch
    first, last = sample.counters_at_first.get("experts"), sample.counters.get("experts")
    if not first or not last:
        return Cost(sample.seconds / tokens, None, None)
    read, stall = (last[key] - first[key] for key in ("bytes_read", "stall_seconds"))
    return Cost(sample.seconds / tokens, read / tokens, stall / tokens)


def _prompt(sample: Sample) -> Cost:
    nothing = {"bytes_read": 0, "stall_seconds": 0.0}
    before = nothing if sample.counters_before is None else sample.counters_before.get("experts")
    after = sample.counters_at_first.get("experts")
    if not before or not after:
        return Cost(sample.first_seconds, None, None)
    return Cost(sample.first_seconds, *(after[key] - before[key] for key in ("bytes_read", "stall_seconds")))
