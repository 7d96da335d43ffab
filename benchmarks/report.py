"""The tables of the page, made from result files only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.analysis import cost, memory_floor, overlap, ratio
from benchmarks.measure import Cell
from benchmarks.results import Results
from fate_moe.units import format_bytes

__all__ = ["cell_text", "facts_line", "limit_name", "markdown", "number", "table"]

# The speeds that are compared: presets of this engine, and what a user would run instead.
OURS = ("fate", "best")
OTHERS = ("load-on-demand", "eap", "llama.cpp", "llama.cpp (wheel)", "ik_llama.cpp")


def limit_name(limit_bytes: int | None) -> str:
    return "none" if limit_bytes is None else format_bytes(limit_bytes)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    rate = cell.rate()
    if cell.outcome in ("killed", "failed") or rate is None:
        return cell.outcome
    rates = cell_rates(cell)
    spread = f" ({number(min(rates))}-{number(max(rates))})" if len(rates) > 1 else ""
    return f"{number(rate)}{spread}" + (" cut" if cell.outcome == "slow" else "")


def speed_text(cell: Cell) -> str:
    """The median speed, or how the cell ended if it has none: one number a cell of the table."""
    rate = cell.rate()
    return cell.outcome if cell.outcome in ("killed", "failed") or rate is None else number(rate)


def cell_rates(cell: Cell) -> list[float]:
    """The speed of every sample, in tokens/s."""
    return cell.prefill_rates() if cell.workload.startswith("prefill") else cell.decode_rates()


def markdown(results: Results) -> str:
    """The section of the page about one model."""
    parts = [facts_line(results)]
    for workload in results.workloads():
        parts.append(speeds(results, workload))
    parts += [compared(results), time_spent(results), every_cell(results)]
    return "\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def facts_line(results: Results) -> str:
    """The heading of a model's section, and what the model and the machine are."""
    model, machine = results.model, results.machine
    rounds = 1 + max((cell.round for cell in results.cells), default=0)
    cut = f"; cells cut at {machine['cell_seconds']:g} s, loading included" if "cell_seconds" in machine else ""
    begun = f" Begun on {machine['date']}, {rounds} round{'s' * (rounds > 1)}{cut}." if "date" in machine else ""
    return (
        f"## {model.name}\n\n"
        f"{model.family}, {model.parameters / 1e9:.2f} B parameters, {model.num_layers} MoE layers x {model.num_experts} experts, "
        f"top-{model.top_k}; INT4 {format_bytes(model.model_bytes)}, an expert {format_bytes(model.expert_bytes)}, read per token "
        f"{format_bytes(model.active_bytes)}. {machine['processor']}, {machine['threads']} threads of {machine['cores']} cores "
        f"({', '.join(machine['instructions'])}), memory {machine['memory_bytes_per_second'] / 1e9:.1f} GB/s, disk "
        f"{machine['disk_bytes_per_second'] / 1e9:.2f} GB/s (both measured in this run). Memory floor of INT4 decode: "
        f"{1 / memory_floor(results):.1f} tokens/s.{begun}\n"
    )


def speeds(results: Results, workload: str) -> str:
    prefill = workload.startswith("prefill")
    what = "prompt tokens/s" if prefill else "new tokens/s"
    text = f"### {workload}: {what} by memory limit\n\n"
    text += by_limit(results, workload, speed_text)
    if not prefill:
        text += f"\nSeconds to the first token ({workload}):\n\n"
        text += by_limit(results, workload, lambda cell: number(median(cell.first_seconds())) if cell.first_seconds() else "")
    return text


def by_limit(results: Results, workload: str, show: Callable[[Cell], str]) -> str:
    cells = [c for c in results.joined() if c.workload == workload]
    limits = [limit for limit in results.limits() if any(c.limit_bytes == limit for c in cells)]
    rows = []
    for peer in results.peers():
        best = [results.best(peer, workload, limit) for limit in limits]
        if any(best):
            rows.append([peer, *(show(cell) if cell else "" for cell in best)])
    return table(["engine", *map(limit_name, limits)], rows)


def compared(results: Results) -> str:
    rows = []
    for workload in results.workloads():
        for ours in OURS:
            for other in OTHERS:
                ratios = [ratio(results, ours, other, workload, limit) for limit in results.limits()]
                if any(ratios):
                    rows.append([workload, f"{ours} / {other}", *(f"{r:.2f}x" if r else "" for r in ratios)])
    if not rows:
        return ""
    head = ["workload", "speed of", *map(limit_name, results.limits())]
    return "### How many times faster\n\n" + table(head, rows)


def time_spent(results: Results) -> str:
    rows = []
    for cell in results.joined():
        spent, hidden = cost(cell), overlap(results, cell)
        if spent is None or hidden is None or spent.read_bytes is None or spent.stall_seconds is None:
            continue
        rows.append(
            [
                cell.peer,
                cell.workload,
                limit_name(cell.limit_bytes),
                format_bytes(spent.read_bytes),
                *(f"{1e3 * s:.1f}" for s in (spent.seconds, hidden.compute_seconds, hidden.read_seconds, spent.stall_seconds)),
                f"{hidden.efficiency:.0%}",
                f"{hidden.max_speedup:.2f}x",
            ]
        )
    if not rows:
        return ""
    return (
        "### What the time is made of\n\n"
        "Milliseconds for one new token, or for one prompt in prefill. *Compute*: the time of the same engine without a limit,\n"
        "less its waiting. *Disk floor*: the bytes read, at this disk's bandwidth. *Overlap*: the larger of these two, divided by\n"
        "the measured time; at 100 % one is hidden completely behind the other. *At most*: how many times faster complete overlap\n"
        "is than reading and computing in turn.\n\n"
        + table(["engine", "workload", "limit", "from disk", "time", "compute", "disk floor", "waited", "overlap", "at most"], rows)
    )


def every_cell(results: Results) -> str:
    rows = []
    for cell in results.joined():
        rate = cell.rate()
        message = f": {cell.message.replace('|', ' ')}" if cell.message else ""
        peak = format_bytes(cell.peak_bytes) if cell.peak_bytes else ""
        name = limit_name(cell.limit_bytes)
        rates = cell_rates(cell) if rate else []
        ends = [number(min(rates)), number(max(rates))] if len(rates) > 1 else ["", ""]
        speed = [number(rate) if rate else "", *ends]
        rows.append([cell.peer, cell.variant, cell.workload, name, cell.outcome + message, *speed, peak])
    versions = {cell.peer: cell.versions for cell in results.cells if cell.versions}
    listed = "; ".join(f"{peer}: " + ", ".join(f"{k} {v}" for k, v in used.items()) for peer, used in versions.items())
    head = ["engine", "variant", "workload", "limit", "outcome", "rate", "lowest", "highest", "peak memory"]
    return f"### Every cell\n\n{table(head, rows)}\nVersions: {listed}\n"
