"""The Fate paper's experiment in this engine: its systems at its budgets, and the ratios that its abstract names.

    python -m benchmarks.paper run CHECKPOINT --home DIR [--rounds 3] [--budgets 25% 52% 80%] [--workloads decode ...]
    python -m benchmarks.paper report [FILE.json ...] [--page docs/results/paper.md]

A budget is the fraction of the experts that have a slot (arXiv 2502.12224: 7 to 12 GB of a GPU are 25 to 94 % of Qwen1.5-MoE's),
without a memory limit, prompts of 64 tokens, batch 1, experts from the disk to RAM. The paper's load-on-demand kept no expert:
`lod-paper`, with INT4 and with lossless experts, whatever the budget. Its other systems are presets of this engine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.analysis import cost
from benchmarks.facts import processor_facts, processor_folder
from benchmarks.measure import Cell
from benchmarks.peers import Variant
from benchmarks.peers.transformers_based import Fate
from benchmarks.report import facts_line, number, table
from benchmarks.results import Results, model_facts
from benchmarks.rounds import Planned, add_options, begin_or_continue, run_rounds
from benchmarks.workloads import WORKLOADS

__all__ = ["HEADER", "System", "markdown"]

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BUDGETS = ("25%", "39%", "52%", "66%", "80%", "94%")
WORKLOADS_OF_PAPER = ("decode", "prefill-128", "prefill-256", "prefill-512")
NO_CACHE = ("lod-paper, lossless", "lod-paper")
CACHED = ("load-on-demand", "eap", "fate", "best")
# Of the abstract: how many times faster Fate is, "up to", than load-on-demand and expert-activation-path.
CLAIMS = {("decode", "lod"): 4.1, ("decode", "eap"): 2.2, ("prefill", "lod"): 4.5, ("prefill", "eap"): 1.9}
HEADER = """# The paper's experiment

Made by `python -m benchmarks.paper report`. Fate (arXiv 2502.12224) reports, over memory budgets, decoding up to 4.1 and 2.2 times
as fast as load-on-demand and expert-activation-path, prefill up to 4.5 and 1.9 times, and 99 % of the experts ready when needed.
Here its systems are presets of one engine, with the same weights, kernels and precision; experts come from the disk to RAM.

- `lod-paper`: no expert stays between tokens; each is read after routing (while the first of a layer is computed,
  the others are still read: faster than strictly in turn).
- `load-on-demand`: ours, an LRU cache over the whole budget. `eap`, `fate`: as published. `best`: this engine's default.
- A budget is the fraction of the experts that have a slot. `lod-paper` uses one layer's slots whatever the budget.
- *Ready*: resident or on their way when needed, the paper's count; in brackets resident, ours. *At most*: the time of a token with
  lossless `lod-paper` over what the bytes that this system reads take alone, or computing alone, whichever is longer: the physical
  bound of the ratio.
- Cells are medians of all rounds; systems took turns in random order, each cell its own process with cold caches.

"""


class System(Fate):
    """A preset with a slot for a fraction of the experts; ``lod-paper`` also with lossless experts."""

    def __init__(self, name: str, budgets: Sequence[str]) -> None:
        self.preset, _, precision = name.partition(", ")
        super().__init__(self.preset)
        self.name, self.precision, self.budgets = name, precision or "int4", budgets

    def prepare(self, checkpoint: Path, home: Path) -> Path:
        if self.precision == "int4":
            return super().prepare(checkpoint, home)
        store = home / "stores" / f"{checkpoint.name}-{self.precision}"
        if not (store / "fate.json").exists():
            # Dense weights as in the other systems: what differs is what travels.
            convert = [sys.executable, "-m", "fate_moe", "convert", str(checkpoint), str(store)]
            subprocess.run([*convert, "--precision", self.precision, "--dense-precision", "int4"], check=True)
        return store

    def variants(self, model: Path, limit_bytes: int | None) -> list[Variant]:
        settings: dict[str, Any] = {"engine": "fate", "preset": self.preset}
        if self.name in NO_CACHE:
            return [Variant("", settings)]
        return [Variant(budget, {**settings, "expert_cache": budget}) for budget in self.budgets]


def run(arguments: argparse.Namespace) -> None:
    """Prepare the stores once, then measure every system at every budget, once a round."""
    facts = model_facts(arguments.checkpoint)
    file: Path = arguments.results or RESULTS / processor_folder(processor_facts()) / "paper" / f"{facts.name}.json"
    results = begin_or_continue(file, facts, arguments)
    systems = [System(name, arguments.budgets) for name in arguments.systems]
    planned = [
        Planned(system, system.install(arguments.home), model, variant, WORKLOADS[workload], None)
        for system in systems
        for model in [system.prepare(arguments.checkpoint, arguments.home)]
        for variant in system.variants(model, None)
        for workload in arguments.workloads
    ]
    run_rounds(planned, results, file, arguments)
    print(file)


def markdown(results: Results) -> str:
    """Tables of one model: speeds by budget, experts ready, and the four ratios beside the paper's."""
    cells = {(cell.peer, cell.variant, cell.workload): cell for cell in results.joined()}
    budgets = sorted({cell.variant for cell in cells.values() if cell.variant}, key=lambda text: float(text.rstrip("%")))
    text = facts_line(results)
    for workload in results.workloads():
        what = "new tokens/s" if workload == "decode" else "prompt tokens/s"
        text += f"\n### {workload}: {what} by budget\n\n"
        text += _by_budget(cells, workload, budgets, lambda cell: number(cell.rate() or 0.0) if cell.rate() else cell.outcome)
    text += "\n### Experts ready when needed, decode\n\n" + _by_budget(cells, "decode", budgets, _ready)
    if (NO_CACHE[0], "", "decode") in cells:
        text += "\n### At most: how many times faster than lossless `lod-paper` physics allows, decode\n\n"
        text += _by_budget(cells, "decode", budgets, lambda cell: _bound(results, cells, cell))
    return text + "\n### The four ratios\n\n" + _ratios(cells, budgets)


def _by_budget(cells: dict[tuple[str, str, str], Cell], workload: str, budgets: Sequence[str], show: Callable[[Cell], str]) -> str:
    rows = []
    for name in (*NO_CACHE, *CACHED):
        always = cells.get((name, "", workload))
        of_budget = [always or cells.get((name, budget, workload)) for budget in budgets]
        if any(of_budget):
            rows.append([name, *(show(cell) if cell else "" for cell in of_budget)])
    return table(["system", *budgets], rows)


def _counted(cell: Cell) -> dict[str, float]:
    """What the measured samples counted in decode, in all."""
    names = ("hits", "in_flight", "misses")
    pairs = [(s.counters_at_first.get("experts"), s.counters.get("experts")) for s in cell.measured()]
    return {name: sum(last[name] - first[name] for first, last in pairs if first and last) for name in names}


def _ready(cell: Cell) -> str:
    counted = _counted(cell)
    lookups = sum(counted.values())
    if not lookups:
        return ""
    return f"{(counted['hits'] + counted['in_flight']) / lookups:.1%} ({counted['hits'] / lookups:.1%})"


def _bound(results: Results, cells: dict[tuple[str, str, str], Cell], cell: Cell) -> str:
    slowest, here = cells.get((NO_CACHE[0], "", "decode")), cost(cell)
    base = cost(slowest) if slowest else None
    if base is None or here is None or here.read_bytes is None:
        return ""
    reading = here.read_bytes / results.machine["disk_bytes_per_second"]
    computing = here.seconds - (here.stall_seconds or 0.0)
    return f"{base.seconds / max(reading, computing):.1f}x"


def _ratios(cells: dict[tuple[str, str, str], Cell], budgets: Sequence[str]) -> str:
    """For each claim the highest ratio over budgets (and prompt lengths), and where it is."""
    rows = []
    for (kind, other), claimed in CLAIMS.items():
        workloads = [name for name in dict.fromkeys(key[2] for key in cells) if name.startswith(kind)]
        for system in ("fate", "best"):
            for baseline in (*NO_CACHE, "load-on-demand") if other == "lod" else ("eap",):
                found = [
                    (ratio, f"{workload}, {budget}")
                    for workload in workloads
                    for budget in budgets
                    if (ratio := _ratio(cells, system, baseline, workload, budget)) is not None
                ]
                if found:
                    highest, where = max(found)
                    middle = median(ratio for ratio, _ in found)
                    rows.append([kind, f"{system} / {baseline}", f"{highest:.1f}x", where, f"{middle:.1f}x", f"{claimed}x"])
    return table(["", "speed of", "highest", "at", "median", "paper, up to"], rows)


def _ratio(cells: dict[tuple[str, str, str], Cell], system: str, baseline: str, workload: str, budget: str) -> float | None:
    ours = cells.get((system, budget, workload))
    theirs = cells.get((baseline, budget, workload)) or cells.get((baseline, "", workload))
    rates = [cell.rate() if cell and cell.outcome in ("ok", "slow") else None for cell in (ours, theirs)]
    return rates[0] / rates[1] if rates[0] and rates[1] else None


def report(arguments: argparse.Namespace) -> None:
    page: Path = arguments.page
    text = HEADER + "\n".join(markdown(Results.load(file)) for file in arguments.files or sorted(RESULTS.glob("*/paper/*.json")))
    page.write_text(text.rstrip() + "\n")
    print(page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description="The Fate paper's experiment.")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run", help="measure; continues an interrupted run")
    add_options(verb, "docs/results/PROCESSOR/paper/MODEL.json")
    verb.add_argument("--systems", nargs="+", choices=[*NO_CACHE, *CACHED], default=[*NO_CACHE, *CACHED])
    verb.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="fractions of the experts")
    verb.add_argument("--workloads", nargs="+", choices=WORKLOADS_OF_PAPER, default=list(WORKLOADS_OF_PAPER))
    verb.set_defaults(do=run)
    verb = verbs.add_parser("report", help="the page, from result files")
    verb.add_argument("files", type=Path, nargs="*", help="default: all under docs/results")
    verb.add_argument("--page", type=Path, default=RESULTS / "paper.md")
    verb.set_defaults(do=report)
    arguments = parser.parse_args(argv)
    try:
        arguments.do(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
