"""The summary of a run: a table on the terminal, JSON, and the table of docs/concepts/reliability.md."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.torture.areas import AREAS
from tests.torture.case import GOOD, Outcome

__all__ = ["as_json", "page", "show"]

_BEGIN, _END = "<!-- torture: begin -->", "<!-- torture: end -->"


def as_json(outcomes: list[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    """What was done and how it ended: by area how often each, its injected faults, and every failure."""
    areas: dict[str, Any] = {}
    for name in AREAS:
        those = [outcome for outcome in outcomes if outcome.area == name]
        if not those:
            continue
        counts: Counter[str] = Counter()
        for outcome in those:
            counts.update(outcome.counts)
        areas[name] = {
            "what": AREAS[name].what,
            "cases": len(those),
            **{ended: sum(outcome.outcome == ended for outcome in those) for ended in GOOD},
            "failures": sum(not outcome.good for outcome in those),
            "kinds": len({outcome.kind for outcome in those}),
            "counts": dict(sorted(counts.items())),
            "longest_seconds": round(max(outcome.seconds for outcome in those), 2),
            "most_grown_bytes": max(outcome.grown_bytes for outcome in those),
        }
    failures = [
        {"area": o.area, "case": o.number, "kind": o.kind, "outcome": o.outcome, "detail": o.detail} for o in outcomes if not o.good
    ]
    return {**facts, "cases": len(outcomes), "areas": areas, "failures": failures}


def show(outcomes: list[Outcome], facts: dict[str, Any]) -> None:
    """The table on the terminal. Failures were printed as they came."""
    summary = as_json(outcomes, facts)
    table = Table(title=f"torture: seed {summary['seed']}, {summary['cases']} cases in {summary['seconds']} s")
    for column in ("area", "cases", "kinds", *GOOD, "failures", "longest", "grown", "injected"):
        table.add_column(column, justify="left" if column in ("area", "injected") else "right")
    for name, area in summary["areas"].items():
        injected = ", ".join(f"{count} {what}" for what, count in area["counts"].items())
        numbers = [str(area[key]) for key in ("cases", "kinds", *GOOD, "failures")]
        style = "bold red" if area["failures"] else None
        table.add_row(
            name, *numbers, f"{area['longest_seconds']} s", f"{area['most_grown_bytes'] >> 20} MiB", injected, style=style
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def page(path: Path, summary: dict[str, Any]) -> None:
    """Put the table of ``summary`` into the Markdown file ``path``, in the place of the one that it has."""
    lines = [
        f"{summary['cases']:,} cases in {summary['seconds'] / 60:.0f} minutes on {summary['workers']} processes, "
        f"seed {summary['seed']}.",
        "",
        "| what was tried | cases | right | refused in one line | another valid input | failures | longest case |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for area in summary["areas"].values():
        injected = "; ".join(f"{count} {what}" for what, count in area["counts"].items())
        numbers = [area["cases"], *(area[key] for key in GOOD[:3]), area["failures"]]
        cells = " | ".join(f"{number:,}" for number in numbers)
        lines.append(f"| {area['what']}{f' ({injected})' if injected else ''} | {cells} | {area['longest_seconds']} s |")
    text = path.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    path.write_text(f"{before}{_BEGIN}\n" + "\n".join(lines) + f"\n{_END}{after}")
