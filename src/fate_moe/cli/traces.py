"""Verbs about prediction and caching: trace, simulate, fit, plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fate_moe.cli.net import say
from fate_moe.cli.options import (
    add_model,
    add_offload_options,
    draw_table,
    offload_config,
    print_json,
    quiet_transformers,
    with_demo_chat,
)
from fate_moe.cli.parser import count, file_path, number, size
from fate_moe.cli.reading import check_output, read_text
from fate_moe.errors import ConfigError
from fate_moe.registry import POLICIES, PREDICTORS, check_name
from fate_moe.units import format_bytes, parse_size

__all__ = ["add_verbs"]

END = "<|endoftext|>"
# What simulate takes from the options, and with --as-recorded from the trace; with the options' defaults.
_SIMULATED: dict[str, Any] = {
    "policy": "best",
    "predictor": "none",
    "capacity": "12.5%,25%,40%,50%,75%",
    "disk_gbps": 1.2,
    "expert_bytes": None,
    "layer_ms": None,
    "overlap_ms": 0.0,
    "latency_ms": 0.0,
}


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    trace = verbs.add_parser("trace", help="record routing", description="Record the routing of decode steps in a .npz file.")
    add_model(trace)
    trace.add_argument(
        "--prompts",
        type=file_path,
        required=True,
        help=f"file with one prompt per line, a .jsonl with 'prompt' fields, or texts separated by {END}; - is standard input",
    )
    trace.add_argument("--out", type=file_path, required=True, help="the .npz file to write; one that is there is replaced")
    trace.add_argument(
        "--max-new-tokens", type=count(2), default=200, metavar="N", help="tokens to generate per prompt; default: %(default)s"
    )
    trace.add_argument(
        "--max-tokens", type=count(2), default=2000, metavar="N", help="tokens to record in total; default: %(default)s"
    )
    how = trace.add_mutually_exclusive_group()
    how.add_argument("--teacher", action="store_true", help="run the file's text token by token instead of generating")
    how.add_argument("--prefill", action="store_true", help="run the text in large passes: faster, but without lookups and times")
    trace.add_argument(
        "--router-inputs", action="store_true", help="record router inputs too (hidden size x 2 bytes per layer and token)"
    )
    trace.set_defaults(verb=_trace)
    add_offload_options(trace)

    simulate = verbs.add_parser("simulate", help="replay a trace", description="Simulate policies and predictors on a trace.")
    simulate.add_argument("trace", type=file_path, help="a .npz file written by `fate trace`")
    simulate.add_argument("--policy", help=f"comma-separated: best, belady, {', '.join(POLICIES)}; default: best")
    simulate.add_argument("--predictor", help=f"comma-separated: {', '.join(PREDICTORS)}, oracle; default: none")
    simulate.add_argument("--capacity", help="comma-separated fractions of all experts; default: %(default)s")
    simulate.add_argument(
        "--disk-gbps", type=number(0, 1e6, above=True), metavar="GB/S", help="bandwidth of the disk; default: %(default)s"
    )
    simulate.add_argument(
        "--expert-bytes", type=size(parse_size), metavar="SIZE", help="size of one expert; default: from the trace, else 4MiB"
    )
    simulate.add_argument(
        "--layer-ms", type=number(0), metavar="MS", help="compute time of one layer; default: the trace's median, else 2.5"
    )
    simulate.add_argument("--overlap-ms", type=number(0), metavar="MS", help="part of it that needs no missing expert; default: 0")
    simulate.add_argument("--latency-ms", type=number(0), metavar="MS", help="latency of a read; default: 0")
    simulate.add_argument(
        "--as-recorded",
        action="store_true",
        help="simulate the traced run's own policy, predictor, slots and measured times, and compare with what it did",
    )
    simulate.add_argument("--gates", type=file_path, metavar="STORE", help="use the fitted gates of this store")
    simulate.add_argument(
        "--look-ahead", type=count(1, 1024), default=1, metavar="K", help="predict up to K layers ahead; default: %(default)s"
    )
    simulate.add_argument("--skip", type=count(0), default=0, metavar="N", help="do not count the first N tokens; default: 0")
    simulate.add_argument("--tokens", type=count(), metavar="N", help="use only the first N tokens")
    simulate.add_argument("--json", action="store_true", help="print one JSON object")
    simulate.set_defaults(verb=_simulate, **_SIMULATED)

    fit = verbs.add_parser("fit", help="fit gates", description="Fit gates that predict routing, and save them in the store.")
    add_model(fit)
    fit.add_argument(
        "--text", type=file_path, required=True, help="text similar to what the model will read and write; - is standard input"
    )
    fit.add_argument("--max-tokens", type=count(), default=30000, metavar="N", help="tokens to fit on; default: %(default)s")
    fit.add_argument(
        "--forecast", action="store_true", help="also fit the forecast, which predicts all layers of a token from its embedding"
    )
    fit.add_argument(
        "--test", type=file_path, metavar="FILE", help="text to measure recall on; default: a held-out tenth of --text"
    )
    fit.add_argument("--test-tokens", type=count(), default=4000, metavar="N", help="tokens of --test; default: %(default)s")
    fit.add_argument("--json", action="store_true", help="print one JSON object")
    fit.set_defaults(verb=_fit)
    add_offload_options(fit)

    plot = verbs.add_parser("plot", help="draw results", description="Draw a picture from a result file (needs matplotlib).")
    plot.add_argument(
        "results", type=file_path, help="a trace (.npz), or the output of `fate simulate --json` or `fate fit --json`"
    )
    plot.add_argument(
        "--out",
        type=file_path,
        required=True,
        help="the picture to write, its format by its name; .json: a Perfetto trace of one token",
    )
    plot.add_argument("--kind", choices=("capacity", "heat", "recall", "timeline"), help="what to draw; default: by the file")
    plot.add_argument(
        "--token", type=count(-(1 << 31)), default=-1, metavar="N", help="which token a timeline shows; default: the last"
    )
    plot.set_defaults(verb=_plot)


def _texts(path: Path) -> list[str]:
    """The texts of a file, as --prompts describes it. Raises ConfigError for a file that cannot be read, or has none."""
    text = read_text(path, "the text file")
    if END in text:
        found = [part.strip() for part in text.split(END)]
    elif path.suffix == ".jsonl":
        found = [_prompt_of(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        found = text.split("\n")
    if not (texts := [one for one in found if one.strip()]):
        raise ConfigError(f"the text file {path} has no text in it")
    return texts


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
        prompt = row.get("prompt") or row["question"]
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where}: every line must be a JSON object with a 'prompt' ({error})") from error
    if not isinstance(prompt, str):
        raise ConfigError(f"{where}: the prompt is no text but {str(prompt)[:40]}")
    return prompt


def _trace(arguments: argparse.Namespace) -> None:
    check_output(arguments.out, arguments.prompts)
    texts = _texts(arguments.prompts)
    quiet_transformers()
    from fate_moe.tools.tracing import record_routing
    from fate_moe.trace.schema import write_trace

    config = offload_config(arguments, 2048)
    trace = record_routing(
        with_demo_chat(arguments.model),
        texts,
        config,
        new_tokens=arguments.max_new_tokens,
        max_tokens=arguments.max_tokens,
        teacher=arguments.teacher,
        prefill=arguments.prefill,
        router_inputs=arguments.router_inputs,
    )
    write_trace(arguments.out, trace)
    num_bytes = format_bytes(arguments.out.stat().st_size)
    say(f"{arguments.out}: {trace.num_tokens} tokens, {trace.num_layers} layers, {num_bytes}")


def _simulate(arguments: argparse.Namespace) -> None:
    runs = list(_runs(arguments))
    import numpy as np

    from fate_moe.io.progress import count_bar
    from fate_moe.trace.recorded import recorded_run
    from fate_moe.trace.schema import read_trace
    from fate_moe.trace.simulate import Link, simulate, size_of_all

    trace = read_trace(arguments.trace)
    if arguments.tokens:
        trace = trace.first(arguments.tokens)
    layer_seconds = 2.5e-3
    if arguments.layer_ms is not None:
        layer_seconds = arguments.layer_ms / 1e3
    elif {"seconds", "stall"} <= set(trace.extras):
        layer_seconds = float(np.median(trace.extras["seconds"] - trace.extras["stall"]))
    expert_bytes = parse_size(arguments.expert_bytes or size_of_all(trace.meta.get("expert_bytes")) or "4MiB")
    times = (arguments.overlap_ms / 1e3, arguments.latency_ms / 1e3)
    link = Link(arguments.disk_gbps * 1e9, expert_bytes, layer_seconds, *times)
    recorded = None
    if arguments.as_recorded:
        recorded = recorded_run(trace, arguments.skip)
        if given := [name for name, default in _SIMULATED.items() if getattr(arguments, name) != default]:
            raise ConfigError(f"--as-recorded takes --{given[0].replace('_', '-')} from the trace; omit one of them")
        link, runs = recorded.link, [(recorded.policy, recorded.predictor, recorded.capacity)]
    gates = None
    if arguments.gates is not None:
        from fate_moe.store.learned import load_gates

        hidden = trace.extras["embeddings"].shape[-1] if "embeddings" in trace.extras else 0
        if (gates := load_gates(arguments.gates, trace.num_experts.tolist(), hidden)) is None:
            raise ConfigError(
                f"{arguments.gates} has no gates for this trace's model; fit them with: fate fit {arguments.gates} --text FILE"
            )
    rows = []
    with count_bar("simulating", len(runs) * trace.num_tokens) as advance:
        for policy, predictor, capacity in runs:
            rows.append(
                simulate(
                    trace,
                    policy,
                    predictor,
                    capacity,
                    link,
                    gates=gates,
                    look_ahead=arguments.look_ahead,
                    skip=arguments.skip,
                    advance=advance,
                ).as_dict()
            )
    if arguments.json:
        link_facts = {
            "disk_gbps": link.bytes_per_second / 1e9,
            "latency_ms": link.latency_seconds * 1e3,
            "expert_bytes": link.expert_bytes,
            "layer_ms": link.layer_seconds * 1e3,
            "overlap_ms": link.overlap_seconds * 1e3,
        }
        measured = {} if recorded is None else {"recorded": recorded.as_dict()}
        print_json({"trace": arguments.trace.name, **link_facts, **measured, "rows": rows})
    else:
        _print_rows(rows)
        if recorded is not None:
            _print_comparison(recorded.as_dict(), rows[0])


def _print_comparison(recorded: dict[str, Any], row: dict[str, Any]) -> None:
    print("recorded, simulated:")
    print(f"  ready on time   {recorded['ready_on_time']:.1%}, {row['ready_on_time']:.1%}")
    print(f"  read per token  {format_bytes(recorded['bytes_per_token'])}, {format_bytes(row['bytes_per_token'])}")
    print(f"  stall           {recorded['stall_seconds']:.2f} s, {row['stall_seconds']:.2f} s")
    print(f"  tokens/s        {recorded['tokens_per_second']:.1f}, {row['tokens_per_second']:.1f}")


def _runs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """Each policy with each predictor and each capacity. Raises ConfigError for a name or a number that is none."""
    try:
        capacities = [float(text.strip().removesuffix("%")) / (100 if "%" in text else 1) for text in arguments.capacity.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--capacity {arguments.capacity!r} is not a list of fractions; write for example 12.5%,25%,50%"
        ) from error
    if not all(0 < capacity <= 1 for capacity in capacities):
        raise ConfigError(f"--capacity {arguments.capacity!r}: fractions lie between 0 and 100 %")
    policies = [text.strip() for text in arguments.policy.split(",")]
    predictors = [text.strip() for text in arguments.predictor.split(",")]
    for policy in policies:
        check_name("policy", policy, ["best", "belady", *POLICIES])
        for predictor in predictors:
            check_name("predictor", predictor, ["oracle", *PREDICTORS])
            for capacity in capacities:
                yield policy, predictor, capacity


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table()
    for column in (
        "policy",
        "predictor",
        "resident",
        "missed",
        "ready on time",
        "read per token",
        "stall",
        "tokens/s",
        "prefetched used",
    ):
        named = column in ("policy", "predictor")
        table.add_column(column, justify="left" if named else "right", no_wrap=named)
    for row in rows:
        used = f"{row['prefetch_used'] / row['prefetched']:.0%} of {row['prefetched']}" if row["prefetched"] else "-"
        rates = [f"{row[name]:.1%}" for name in ("capacity", "miss_rate", "ready_on_time")]
        read, stall = format_bytes(row["bytes_per_token"]), f"{row['stall_seconds']:.2f} s"
        table.add_row(row["policy"], row["predictor"], *rates, read, stall, f"{row['tokens_per_second']:.1f}", used)
    draw_table(table)


def _fit(arguments: argparse.Namespace) -> None:
    texts = _texts(arguments.text)
    test_texts = [] if arguments.test is None else _texts(arguments.test)
    quiet_transformers()
    from fate_moe.tools.tracing import fit_gates

    found = fit_gates(
        with_demo_chat(arguments.model),
        texts,
        offload_config(arguments, 512),
        max_tokens=arguments.max_tokens,
        forecast=arguments.forecast,
        test_texts=test_texts,
        test_tokens=arguments.test_tokens,
    )
    if arguments.json:
        print_json(found)
    else:
        _print_recall(found)


def _print_recall(found: dict[str, Any]) -> None:
    print(f"{found['gates']}: fitted on {found['fitted_tokens']} tokens; recall on {found['tested_tokens']} others, %")
    for ahead, rows in enumerate(found["by_ahead"], start=1):
        for name, by_width in rows.items():
            _print_means(f"{name}, {ahead} ahead", {width: row["mean"] for width, row in by_width.items()})
        embedding = {width: row["layers"][ahead - 1] for width, row in rows["fitted"].items()}
        _print_means(f"layer {ahead - 1} from the embedding", embedding)
    if found["forecast"]:
        _print_means("whole token", {width: row["mean"] for width, row in found["forecast"].items()})


def _print_means(what: str, means: dict[int, float | None]) -> None:
    if None not in means.values():
        print(f"  {what:<26}" + ", ".join(f"top-{width} {100 * (mean or 0):.1f}" for width, mean in means.items()))


def _plot(arguments: argparse.Namespace) -> None:
    check_output(arguments.out, arguments.results)
    from fate_moe.trace.plots import draw

    draw(arguments.results, arguments.out, arguments.kind, arguments.token)
