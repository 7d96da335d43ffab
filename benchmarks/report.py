"""Tables and pictures, from result files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.measure import Cell
from benchmarks.results import Results
from fate_moe.config import format_bytes

__all__ = ["floors", "markdown", "plot"]


def floors(results: Results) -> tuple[float, Callable[[float], float]]:
    """Seconds per decoded token that no engine on this machine can go below with INT4: (memory, bytes missed -> disk)."""
    memory = results.model.active_bytes / results.machine["memory_bytes_per_second"]
    return memory, lambda missed_bytes: missed_bytes / results.machine["disk_bytes_per_second"]


def read_per_token(cell: Cell) -> tuple[float, float] | None:
    """(bytes from disk, seconds waited) per token of the measured samples, prompts included; None if the engine does not count."""
    counted = [sample for sample in cell.samples if sample.counters.get("experts")]
    if len(counted) < 2:
        return None
    first, last = counted[0].counters["experts"], counted[-1].counters["experts"]
    tokens = sum(sample.prompt_tokens + sample.count for sample in counted[1:]) * cell.batch
    return (last["bytes_read"] - first["bytes_read"]) / tokens, (last["stall_seconds"] - first["stall_seconds"]) / tokens


def limit_name(limit_bytes: int | None) -> str:
    return "none" if limit_bytes is None else format_bytes(limit_bytes)


def cell_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    rate = cell.rate()
    if cell.outcome in ("killed", "failed") or rate is None:
        return cell.outcome
    rates = cell.prefill_rates() if cell.workload.startswith("prefill") else cell.decode_rates()
    spread = f" ({_number(min(rates))}-{_number(max(rates))})" if len(rates) > 1 else ""
    return f"{_number(rate)}{spread}" + (" cut" if cell.outcome == "slow" else "")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown(results: Results) -> str:
    """The page's part about one model: facts, one table a workload, variants tried, what failed and why."""
    model, machine = results.model, results.machine
    memory, _ = floors(results)
    lines = [
        f"## {model.name}",
        "",
        f"{model.family}, {model.parameters / 1e9:.2f} B parameters, {model.num_layers} MoE layers x {model.num_experts} experts, "
        f"top-{model.top_k}; INT4 {format_bytes(model.model_bytes)}, an expert {format_bytes(model.expert_bytes)}, read per token "
        f"{format_bytes(model.active_bytes)}. {machine['processor']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"memory {machine['memory_bytes_per_second'] / 1e9:.1f} GB/s, disk {machine['disk_bytes_per_second'] / 1e9:.2f} GB/s (both "
        f"measured in this run). Memory floor of INT4 decode: {1 / memory:.1f} tokens/s.",
    ]
    limits, peers = results.limits(), results.peers()
    for workload in results.workloads():
        what = "prompt tokens/s" if workload.startswith("prefill") else "new tokens/s"
        lines += ["", f"### {workload}: {what}, median (lowest-highest) by memory limit", ""]
        lines += ["| engine | " + " | ".join(limit_name(limit) for limit in limits) + " |", "| --- " * (len(limits) + 1) + "|"]
        for peer in peers:
            texts = [cell_text(results.best(peer, workload, limit)) for limit in limits]
            if any(texts):
                lines.append(f"| {peer} | " + " | ".join(texts) + " |")
        if not workload.startswith("prefill"):
            lines += ["", f"First token, seconds ({workload}):", ""]
            lines += ["| engine | " + " | ".join(limit_name(limit) for limit in limits) + " |", "| --- " * (len(limits) + 1) + "|"]
            for peer in peers:
                cells = [results.best(peer, workload, limit) for limit in limits]
                texts = [_number(median(cell.first_seconds())) if cell and cell.first_seconds() else "" for cell in cells]
                if any(texts):
                    lines.append(f"| {peer} | " + " | ".join(texts) + " |")
    traffic = [(cell, read) for cell in results.cells if cell.workload == "decode" and (read := read_per_token(cell))]
    if traffic:
        lines += ["", "### Where the time goes (decode; prompt tokens counted in)", ""]
        lines += ["| engine | limit | from disk per token | waited per token | disk floor per token |", "| --- " * 5 + "|"]
        for cell, (missed, stall) in traffic:
            amounts = f"{format_bytes(missed)} | {stall * 1e3:.1f} ms | {floors(results)[1](missed) * 1e3:.1f} ms"
            lines.append(f"| {cell.peer} | {limit_name(cell.limit_bytes)} | {amounts} |")
    lines += [
        "",
        "### Every cell",
        "",
        "| engine | variant | workload | limit | outcome | rate | peak memory |",
        "| --- " * 7 + "|",
    ]
    for cell in results.cells:
        rate = cell.rate()
        lines.append(
            f"| {cell.peer} | {cell.variant} | {cell.workload} | {limit_name(cell.limit_bytes)} | {cell.outcome}"
            f"{': ' + cell.message.replace('|', ' ') if cell.message else ''} | {_number(rate) if rate else ''} | "
            f"{format_bytes(cell.peak_bytes) if cell.peak_bytes else ''} |"
        )
    versions = {cell.peer: cell.versions for cell in results.cells if cell.versions}
    lines += [
        "",
        "Versions: " + "; ".join(f"{peer}: " + ", ".join(f"{k} {v}" for k, v in used.items()) for peer, used in versions.items()),
    ]
    return "\n".join(lines) + "\n"


def plot(results: Results, folder: Path) -> list[Path]:
    """Decode speed and first-token time against the limit, bytes and stall per token; PNG files in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    limits = results.limits()
    places = list(range(len(limits)))
    memory, disk = floors(results)
    made = []

    def finish(figure: plt.Figure, axes: plt.Axes, what: str, ylabel: str) -> None:
        axes.set_xticks(places, [limit_name(limit) for limit in limits])
        axes.set(xlabel="memory limit", ylabel=ylabel, title=results.model.name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        made.append(folder / f"{results.model.name}-{what}.png")
        figure.savefig(made[-1], dpi=110)
        plt.close(figure)

    def line(axes: plt.Axes, peer: str, value: Callable[[Cell], float | None], style: str = "o-") -> None:
        cells = [results.best(peer, "decode", limit) for limit in limits]
        points = [(place, v) for place, cell in zip(places, cells, strict=True) if cell and (v := value(cell)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=peer)

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for peer in results.peers():
        line(axes, peer, Cell.rate)
    axes.axhline(1 / memory, color="grey", linestyle=":", label="floor: active bytes / memory bandwidth")
    for peer in results.peers():
        cells = [results.best(peer, "decode", limit) for limit in limits]
        reads = [(place, read[0]) for place, cell in zip(places, cells, strict=True) if cell and (read := read_per_token(cell))]
        points = [(place, 1 / disk(missed)) for place, missed in reads if missed and disk(missed) > memory / 4]
        if points:
            axes.plot(*zip(*points, strict=True), "x:", color="grey", label=f"floor: {peer}'s bytes / disk bandwidth")
    axes.set_yscale("log")
    finish(figure, axes, "decode", "new tokens/s")

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for peer in results.peers():
        line(axes, peer, lambda cell: median(cell.first_seconds()) if cell.first_seconds() else None)
    axes.set_yscale("log")
    finish(figure, axes, "first-token", "seconds to the first token (64 tokens)")

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for peer in results.peers():
        line(axes, peer, lambda cell: traffic[0] / 1e6 if (traffic := read_per_token(cell)) else None)
    stall = axes.twinx()
    for peer in results.peers():
        line(stall, peer, lambda cell: traffic[1] * 1e3 if (traffic := read_per_token(cell)) else None, "x:")
    stall.set_ylabel("waited, ms per token (dotted)")
    finish(figure, axes, "traffic", "from disk, MB per token")
    return made
