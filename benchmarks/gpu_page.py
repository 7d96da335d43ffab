"""The GPU tier's page of results, from what ``benchmarks.gpu --json`` wrote: one number a cell.

python -m benchmarks.gpu_page docs/results/gpu.json --page docs/results/gpu.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["page"]

HEADER = """# GPU

Made by `python -m benchmarks.gpu_page` from `gpu.json`, which `python -m benchmarks.gpu` measured: {device}, torch {torch}, triton
{triton}, transformers {transformers}; batch 1, random weights with made-up but measured routing. Rows are presets and variants:
`best`, `no prefetch` (the same without copying ahead), `always ahead` (copying ahead although the trial at load time says no),
`host` (half of the misses computed by the CPU), `fate`, `eap`, `load on demand`. *bound*: the fewest misses that any choice of
victims has, with every copy foreseen and hidden. How it was measured and what was tried is in the [notebook](../notebook/gpu.md).

![Decode speed against the share of experts in VRAM](gpu.png)
"""


def page(facts: dict[str, Any]) -> str:
    """The page's Markdown; ``facts`` is the JSON."""
    parts = [HEADER.format(**facts)]
    for name, model in facts["models"].items():
        parts.append(f"## {name}\n")
        cells: dict[str, dict[str, Any]] = model["cells"]
        for title, key, show in COLUMNS:
            parts.append(_table(title, {cell: row for cell, row in cells.items() if "prefill" not in cell}, key, show))
        prompts = sorted({int(cell.split()[2]) for cell in cells if "prefill" in cell})
        for tokens in prompts:
            mark = f" prefill {tokens} "
            of_prompt = {cell.replace(mark, " "): row for cell, row in cells.items() if mark in cell}
            parts.append(_table(f"Prompts of {tokens} tokens, prompt tokens/s", of_prompt, "tokens_per_second", _number))
    return "\n".join(part for part in parts if part)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("New tokens/s by share of experts in VRAM", "tokens_per_second", _number),
    ("Of the fully resident speed", "of_resident", _percent),
    ("Experts ready after routing", "ready", _percent),
    ("Misses per token", "misses_per_token", _number),
)


def _table(title: str, cells: dict[str, dict[str, Any]], key: str, show: Callable[[float], str]) -> str:
    """A row a method, a column a share of experts in VRAM; empty where nothing was measured."""
    found: dict[str, dict[str, str]] = {}
    for cell, row in cells.items():
        share, method = cell.split(" ", 1)
        if key in row:
            found.setdefault(method, {})[share] = show(row[key])
    if not found:
        return ""
    shares = sorted({share for row in found.values() for share in row}, key=float, reverse=True)
    lines = [["method", *(f"{100 * float(share):.0f} %" for share in shares)], ["---"] * (len(shares) + 1)]
    lines += [[method, *(row.get(share, "") for share in shares)] for method, row in found.items()]
    return f"### {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.page.write_text(page(json.loads(arguments.results.read_text())))


if __name__ == "__main__":
    main()
