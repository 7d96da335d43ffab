"""The pictures of the page, made from result files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.analysis import cost, memory_floor
from benchmarks.measure import Cell
from benchmarks.report import limit_name
from benchmarks.results import Results

__all__ = ["plot"]


def plot(results: Results, folder: Path) -> list[Path]:
    """Decode speed and first-token time against the limit, bytes and waiting per token; PNG files in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    limits = results.limits()
    places = list(range(len(limits)))
    disk = results.machine["disk_bytes_per_second"]
    colours = {peer: f"C{number}" for number, peer in enumerate(results.peers())}
    files = []

    def line(axes: plt.Axes, peer: str, value: Callable[[Cell], float | None], style: str, label: str = "") -> None:
        cells = [results.best(peer, "decode", limit) for limit in limits]
        points = [
            (place, shown)
            for place, cell in zip(places, cells, strict=True)
            if cell and cell.outcome in ("ok", "slow") and (shown := value(cell)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colours[peer], label=label or "_" + peer)

    def read(cell: Cell) -> float | None:
        spent = cost(cell)
        return spent.read_bytes if spent else None

    def waited(cell: Cell) -> float | None:
        spent = cost(cell)
        return 1e3 * spent.stall_seconds if spent and spent.stall_seconds is not None else None

    def disk_floor(cell: Cell) -> float | None:
        num_bytes = read(cell)
        return disk / num_bytes if num_bytes and num_bytes / disk > memory_floor(results) / 4 else None

    def draw(name: str, ylabel: str, values: list[tuple[Callable[[Cell], float | None], str, str]], floor: bool = False) -> None:
        figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
        for peer in results.peers():
            for value, style, suffix in values:
                line(axes, peer, value, style, peer + suffix)
        if floor:
            axes.axhline(1 / memory_floor(results), color="grey", linestyle=":", label="floor: active bytes / memory bandwidth")
        axes.set_yscale("log")
        axes.set_xticks(places, [limit_name(limit) for limit in limits])
        axes.set(xlabel="memory limit", ylabel=ylabel, title=results.model.name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        files.append(folder / f"{results.model.name}-{name}.png")
        figure.savefig(files[-1], dpi=110)
        plt.close(figure)

    floors: list[tuple[Callable[[Cell], float | None], str, str]] = [
        (Cell.rate, "o-", ""),
        (disk_floor, "x:", ": its missed bytes / disk bandwidth"),
    ]
    draw("decode", "new tokens/s", floors, floor=True)
    draw("first-token", "seconds to the first of 64 tokens", [(lambda c: median(c.first_seconds() or [float("nan")]), "o-", "")])
    draw("traffic", "MB from disk (o), ms waited (x), per token", [
        (lambda c: num / 1e6 if (num := read(c)) else None, "o-", ""),
        (waited, "x:", ", waited"),
    ])  # fmt: skip
    return files
