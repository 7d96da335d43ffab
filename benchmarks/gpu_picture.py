"""Draws decode speed against the fraction of experts in VRAM, from the JSON of ``benchmarks.gpu``: one panel per model.

    python -m benchmarks.gpu_picture gpu.json --out docs/results/gpu.png

Also drawn: the goals, and the bound of the link (minimal misses at that size, perfect prediction, copies in parallel with all other
work).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GOALS = {0.45: 0.85, 0.25: 0.65, 0.15: 0.50}
LINES = {
    "best": ("C0", "best"), "host": ("C1", "best, half of the misses on the host"), "no prefetch": ("C2", "no prefetch"),
    "fate": ("C3", "Fate"), "eap": ("C4", "EAP"), "load on demand": ("C5", "load on demand"), "bound": ("0.5", "bound of the link"),
}  # fmt: skip


def curves(cells: dict[str, dict[str, Any]]) -> dict[str, dict[float, float]]:
    """By method: fraction of experts in VRAM -> fraction of the fully resident speed."""
    lines: dict[str, dict[float, float]] = {}
    for name, row in cells.items():
        share, method = name.split(" ", 1)
        if method in LINES and "of_resident" in row:
            lines.setdefault(method, {})[float(share)] = row["of_resident"]
    return {method: {1.0: 1.0} | dict(sorted(line.items(), reverse=True)) for method, line in lines.items()}


def draw(models: dict[str, dict[str, Any]], out: Path) -> None:
    """Write the picture of ``models`` ("models" of the JSON) to ``out``."""
    shown = {name: lines for name, model in models.items() if len(lines := curves(model["cells"])) > 1}
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.2), sharey=True, squeeze=False)
    for axis, (name, lines) in zip(axes[0], shown.items(), strict=True):
        for method, line in lines.items():
            color, label = LINES[method]
            style = "--" if method == "bound" else "o-"
            axis.plot(
                [100 * share for share in line], [100 * value for value in line.values()], style, color=color, label=label, ms=4
            )
        axis.plot([100 * share for share in GOALS], [100 * goal for goal in GOALS.values()], "k_", ms=14, mew=2, label="goal")
        resident = next(row["tokens_per_second"] for cell, row in models[name]["cells"].items() if cell.startswith("1.00 "))
        axis.set(title=f"{name.split(', dense')[0]}: 100 % is {resident:.0f} tokens/s", xlabel="experts in VRAM, %", ylim=(0, 105))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("decode speed, % of fully resident")
    axes[0][0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    models: dict[str, dict[str, Any]] = {}
    for file in arguments.results:
        models |= json.loads(file.read_text())["models"]
    draw(models, arguments.out)


if __name__ == "__main__":
    main()
