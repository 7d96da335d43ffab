"""The quality page's tables and picture, from its JSON alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["draw", "fill_page", "tables"]

SOLVER_NAMES = {"minmax": "min/max", "hqq": "HQQ"}
TITLES = {"windows": "windows of 512 tokens", "decode": "token by token"}


def tables(facts: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by their names in the page: "embedded windows", "embedded decode", .., "errors", "conversion"."""
    by_name = {"errors": _errors(facts["errors"]), "conversion": _conversion(facts["models"])}
    for name, model in facts["models"].items():
        for kind in TITLES:
            by_name[f"{name} {kind}"] = _lines(model[kind])
    return by_name


def fill_page(facts: dict[str, Any], page: Path) -> None:
    """Replace the text between <!-- NAME --> and <!-- end --> by the table of that name. Raises KeyError for an unknown name."""
    by_name = tables(facts)
    pattern = re.compile(r"(<!-- (?!end)([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(pattern.sub(lambda match: f"{match[1]}{by_name[match[2]]}{match[3]}", page.read_text()))


def draw(facts: dict[str, Any], path: Path) -> None:
    """Loss of perplexity against bytes read per token: a row of panels for each model, prefill and decode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    models = facts["models"]
    names = list(dict.fromkeys(line["name"] for of in models.values() for kind in TITLES for line in of[kind]))
    colors = pyplot.get_cmap("tab20").colors
    figure, panels = pyplot.subplots(len(models), 2, figsize=(13, 4.5 * len(models)), squeeze=False)
    for row, (name, model) in zip(panels, models.items(), strict=True):
        for axes, (kind, title) in zip(row, TITLES.items(), strict=True):
            if not model[kind]:  # not measured
                axes.set_axis_off()
                continue
            lossless = next(line["perplexity"] for line in model[kind] if line["name"] == "lossless")
            for line in model[kind]:
                lost = max(0.03, 100 * (line["perplexity"] / lossless - 1))
                number = names.index(line["name"])
                point = {"marker": "ov^sDP"[number % 6], "color": colors[number % 20], "markeredgecolor": "black"}
                axes.plot(line["bytes_per_token"] / 1024, lost, linestyle="", label=line["name"], **point)
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "25" else ""))
            axes.set_title(f"{name}, {title}")
            axes.set_xlabel("KiB read per token, 25 % of the experts resident")
            axes.set_ylabel("perplexity above lossless, % (0.03: less)")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=6.5, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def _lines(lines: list[dict[str, Any]]) -> str:
    """Policies and views, compared with all bits of the same store (a calibrated one if the name begins with "calibrated")."""
    by_name = {line["name"]: line for line in lines}

    def rows() -> Iterator[list[str]]:
        for line in lines:
            small = line["name"].startswith("calibrated, groups of 32")
            calibrated = "INT4, calibrated, groups of 32" if small else "INT4, calibrated"
            whole = calibrated if line["name"].startswith("calibrated") else "INT4"
            against = [f"{line['perplexity'] / by_name[base]['perplexity'] - 1:+.1%}" for base in ("lossless", whole)]
            size = line["bytes_per_token"]
            fewer = f"{size / by_name[whole]['bytes_per_token'] - 1:+.0%}"
            speed = line["tokens_per_second"]
            yield [line["name"], f"{line['perplexity']:.2f}", *against, f"{size / 1024:,.0f} KiB", fewer, f"{speed:,.4g}"]

    head = ["experts", "perplexity", "against lossless", "against INT4", "read per token", "against INT4", "tokens/s"]
    return _table(head, rows())


def _errors(errors: list[dict[str, Any]]) -> str:
    views = {"INT8": 8, "INT4": 4, "3-bit view": 3, "2-bit view": 2}
    rows = (
        [row["model"], SOLVER_NAMES[row["solver"]], str(row["group_size"])]
        + [f"{row[f'{what}_{bits}']:.{4 if bits == 8 else 3}f}" for bits in views.values() for what in ("weights", "outputs")]
        for row in errors
    )
    return _table(["weights", "solver", "group", *(cell for name in views for cell in (name, "outputs"))], rows)


def _conversion(models: dict[str, Any]) -> str:
    rows = (
        [name, store, f"{took['seconds']:.1f} s", f"{took['source_mb_per_second']:.1f} MB/s", f"{took['peak_mib']:.0f} MiB"]
        for name, model in models.items()
        for store, took in model.get("conversions", {}).items()
    )
    return _table(["model", "store", "time", "of lossless weights", "peak memory"], rows)
