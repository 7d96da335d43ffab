"""Pictures of traces and simulations, from their files alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fate_moe.errors import ConfigError
from fate_moe.io.files import atomic_file
from fate_moe.trace.schema import RoutingTrace, read_trace

__all__ = ["draw", "figure_of", "timeline"]

LANES = ("compute", "wait", "demand reads", "prefetches")
COLORS = ("tab:blue", "tab:red", "tab:orange", "tab:green")
FOUND = ("hit", "in flight", "miss")


def draw(results: Path, out: Path, kind: str | None = None, token: int = -1) -> None:
    """Draw ``results`` into ``out``, as ``figure_of`` describes.

    If ``out`` ends in .json it becomes a Chrome trace (for Perfetto) of one ``token`` of a trace. Raises ConfigError for files that
    cannot be drawn.
    """
    if out.suffix == ".json":
        if kind not in (None, "timeline"):
            raise ConfigError(f"{out.name} is a Perfetto trace of one token, not {kind}; name a .png or omit --kind")
        events = timeline(read_trace(results), token)
        data = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()
    else:
        data = _picture(results, out, kind, token)
    with atomic_file(out.resolve()) as file:  # what a link points to
        file.write(data)


def _picture(results: Path, out: Path, kind: str | None, token: int) -> bytes:
    """The picture in the format that ``out`` names. Raises ConfigError for a format that matplotlib does not write."""
    _figure_class()
    from matplotlib.backend_bases import FigureCanvasBase

    format_, known = out.suffix.removeprefix(".").lower(), sorted(FigureCanvasBase.get_supported_filetypes())
    if format_ not in known:
        raise ConfigError(f"{out.name!r} names no format of a picture; end it in one of .{', .'.join(known)}, or .json")
    with tempfile.TemporaryDirectory() as folder:
        figure_of(results, kind, token).savefig(path := Path(folder) / out.name, dpi=110)
        return path.read_bytes()


def figure_of(results: Path, kind: str | None = None, token: int = -1) -> Any:
    """A matplotlib figure: of a simulation's rows as "capacity" or "recall", of a trace as "heat" or (one ``token``) "timeline", of
    the output of `fate fit` as recall by the number of experts named. Raises ConfigError for files that cannot be drawn."""
    if results.suffix == ".npz":
        _check_kind(results, kind, ("heat", "timeline"))
        return _figure(_timeline if kind == "timeline" else _heat, read_trace(results), token)
    try:
        found = json.loads(results.read_text("utf-8-sig").splitlines()[-1])
        if "by_ahead" in found:
            _check_kind(results, kind, ("recall",))
            return _figure(_widths, found, token)
        _check_kind(results, kind, ("capacity", "recall"))
        return _figure(_recall if kind == "recall" else _capacity, found["rows"], token)
    except OSError as error:
        raise ConfigError(f"{results} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{results} holds no rows ({error}); make it with: fate simulate --json > {results}") from error


def timeline(trace: RoutingTrace, token: int) -> list[dict[str, Any]]:
    """One token as Chrome trace events (microseconds) in four lanes: compute, waits, demand reads, prefetches. A read belongs to
    the token in which it ended."""
    if not {"seconds", "stall", "lookups"} <= set(trace.extras):
        raise ConfigError("this trace has no times; record one without --prefill: fate trace MODEL --prompts FILE --out T.npz")
    if not -trace.num_tokens <= token < trace.num_tokens:
        raise ConfigError(f"the trace has {trace.num_tokens} tokens, the first is 0; there is no token {token}")
    seconds, stall, lookups = (trace.extras[name][token] for name in ("seconds", "stall", "lookups"))
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": lane, "args": {"name": name}} for lane, name in enumerate(LANES)
    ]
    at = 0.0
    for layer, (whole, waited) in enumerate(zip(seconds.tolist(), stall.tolist(), strict=True)):
        found = {name: int((lookups[layer] == value).sum()) for value, name in enumerate(FOUND)}
        common = {"ph": "X", "pid": 0, "args": {"layer": layer, "experts": trace.experts[token, layer].tolist(), **found}}
        if waited > 0:
            events.append({**common, "name": f"wait {layer}", "tid": 1, "ts": at * 1e6, "dur": waited * 1e6})
        events.append({**common, "name": f"layer {layer}", "tid": 0, "ts": (at + waited) * 1e6, "dur": (whole - waited) * 1e6})
        at += whole
    reads = trace.extras.get("reads", np.zeros((0, 6)))
    number = token % trace.num_tokens
    for _, layer, expert, demanded, began, ended in reads[reads[:, 0] == number].tolist():
        name, lane = f"expert {expert:.0f} of layer {layer:.0f}", 2 if demanded else 3
        events.append({"name": name, "ph": "X", "pid": 0, "tid": lane, "ts": began * 1e6, "dur": (ended - began) * 1e6})
    return events


def _check_kind(results: Path, kind: str | None, possible: tuple[str, ...]) -> None:
    if kind is not None and kind not in possible:
        raise ConfigError(f"{results} can be drawn as {' or '.join(possible)}, not as {kind}")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib; install it with: pip install matplotlib") from error
    return Figure


def _figure(paint: Any, data: Any, token: int) -> Any:
    figure = _figure_class()(figsize=(7.2, 4.0), layout="constrained")
    paint(figure, data, token)
    return figure


def _capacity(figure: Any, rows: list[dict[str, Any]], token: int) -> None:
    axes = figure.subplots()
    for policy, predictor in dict.fromkeys((row["policy"], row["predictor"]) for row in rows):
        mine = sorted(
            (row for row in rows if (row["policy"], row["predictor"]) == (policy, predictor)), key=lambda row: row["capacity"]
        )
        label = policy if predictor == "none" else f"{policy}, {predictor}"
        style = {"color": "black", "linestyle": "--"} if policy == "belady" else {}
        axes.plot(
            [100 * row["capacity"] for row in mine], [100 * row["ready_on_time"] for row in mine], marker="o", label=label, **style
        )
    axes.set(xlabel="experts in memory, %", ylabel="ready on time, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)


def _recall(figure: Any, rows: list[dict[str, Any]], token: int) -> None:
    axes = figure.subplots()
    for policy, predictor in dict.fromkeys((row["policy"], row["predictor"]) for row in rows):
        mine = sorted(
            (row for row in rows if (row["policy"], row["predictor"]) == (policy, predictor)), key=lambda row: row["capacity"]
        )
        read = [row["bytes_per_token"] / 1e6 for row in mine]
        axes.plot(read, [100 * row["ready_on_time"] for row in mine], marker="o", label=f"{policy}, {predictor}")
    axes.set(xlabel="MB read per token", ylabel="ready on time, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _widths(figure: Any, found: dict[str, Any], token: int) -> None:
    """Recall by the number of experts named, means over layers."""
    axes = figure.subplots()
    lines = {
        f"{name}, {ahead} ahead": {width: row["mean"] for width, row in by_width.items()}
        for ahead, rows in enumerate(found["by_ahead"], start=1)
        for name, by_width in rows.items()
    }
    fitted = found["by_ahead"][0]["fitted"]
    lines["layer 0, from the embedding"] = {width: row["layers"][0] for width, row in fitted.items()}
    lines["whole token"] = {width: row["mean"] for width, row in found["forecast"].items()}
    for label, means in lines.items():
        if means and None not in means.values():
            style = "--" if label.startswith("plain") else "-"
            axes.plot([int(width) for width in means], [100 * mean for mean in means.values()], style, marker="o", label=label)
    axes.set(xlabel="experts named", ylabel="of those chosen, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)


def _heat(figure: Any, trace: RoutingTrace, token: int) -> None:
    axes = figure.subplots()
    width = int(trace.num_experts.max())
    counts = np.stack([np.bincount(trace.experts[:, layer].reshape(-1), minlength=width) for layer in range(trace.num_layers)])
    picture = axes.imshow(100 * counts / trace.num_tokens, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    figure.colorbar(picture, label="tokens that chose it, %")


def _timeline(figure: Any, trace: RoutingTrace, token: int) -> None:
    axes = figure.subplots()
    for event in timeline(trace, token):
        if event["ph"] == "X":
            left, color = event["ts"] / 1e3, COLORS[event["tid"]]
            axes.barh(event["tid"], event["dur"] / 1e3, left=left, color=color, edgecolor="white", linewidth=0.5, alpha=0.8)
    axes.set(yticks=range(len(LANES)), yticklabels=LANES, xlabel="ms")
