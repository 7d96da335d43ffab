"""Compares engines: the same weights, memory limit and machine for each, in one run.

python -m benchmarks run CHECKPOINT --home DIR [--results FILE.json]  measure; continues an interrupted run
python -m benchmarks report [FILE.json ...] [--page PAGE.md]          tables and pictures, of all results by default
python -m benchmarks peers                                            list the engines
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.facts import processor_facts, processor_folder
from benchmarks.limits import can_limit
from benchmarks.peers import Peer
from benchmarks.peers.llama_based import LlamaCpp
from benchmarks.peers.transformers_based import Accelerate, Fate
from benchmarks.pictures import plot
from benchmarks.report import markdown
from benchmarks.results import Results, model_facts
from benchmarks.rounds import Planned, add_options, begin_or_continue, run_rounds
from benchmarks.workloads import WORKLOADS
from fate_moe.units import parse_amount

PEERS: dict[str, Callable[[], Peer]] = {
    **{preset: partial(Fate, preset) for preset in ("load-on-demand", "eap", "fate", "best")},
    "llama.cpp": lambda: LlamaCpp("llama.cpp", "llama-cpp-python==0.3.36"),
    "llama.cpp-wheel": lambda: LlamaCpp("llama.cpp (wheel)", "xllamacpp==2026.10.11549"),
    "ik_llama.cpp": lambda: LlamaCpp("ik_llama.cpp", "ik-llama-cpp-python==0.1.5"),
    "accelerate": Accelerate,
}
LIMITS = ("none", "78%", "65%", "52%", "39%")
RESULTS = Path(__file__).parents[1] / "docs" / "results"
HEADER = """# Benchmarks

Made by `python -m benchmarks report` from the result files beside the pictures, one folder a processor. Every cell is its own
process, started with cold caches in a control group with the given limit (page cache included). *killed*: by the limit.
*slow*: stopped at the time limit; its complete samples are counted, or the incomplete ones if there are no others; without a
rate no token came in time. The first prompt of a cell warms up and is counted only if there is no other. A run measures its cells
once a round, in a random order, and is refused if the code changes meanwhile. Of several variants of an engine the fastest is
shown; all are listed at the end. Decoding is greedy; prompts are real text, cut to length; every engine gets the context length
that the workload needs. The checkpoints and the cells:

    python -m benchmarks.random_checkpoint Qwen1.5-MoE-A2.7B/config.json DIR/qwen-geometry --tokenizer src/fate_moe/demo/model
    python -m benchmarks.upcycle DIR/smollm2-wide --hidden 2304 --expert-width 768 --shared-width 1536
    python -m benchmarks run DIR/smollm2-wide --home DIR --results FILE.json --peers best llama.cpp llama.cpp-wheel ik_llama.cpp \\
      --limits none --workloads decode decode-batch-4 prefill-512 --rounds 1 --seconds 25
    python -m benchmarks run DIR/smollm2-wide --home DIR --results FILE.json --limits 52% --workloads decode --rounds 1 --seconds 25

- `load-on-demand`, `eap`, `fate`, `best`: presets of this engine, experts and dense weights INT4. The budget is the limit
  minus 256 MiB for the page cache of Python's and torch's libraries.
- `llama.cpp`: llama-cpp-python, compiled for the processor it runs on (AVX-512 with VNNI and BF16; its AMX kernels crash and
  are disabled). `llama.cpp (wheel)`: xllamacpp's prebuilt AVX2 wheel. `ik_llama.cpp`: ik-llama-cpp-python's wheel; it crashes
  with four sequences. All use Q4_0 of the same checkpoint and mmap, repacked (the default) or not. llama.cpp's qwen2moe graph
  does not normalize routing weights, so smollm2-wide, which needs that, is written for the ernie4_5-moe graph, which does and
  computes the same function (see gguf_export).
- At 2.84 GiB llama.cpp and ik_llama.cpp wrote three or four tokens of smollm2-wide in the time of a cell, so ratios there are
  rough.
- qwen-geometry is older, from different hours of one day and before much of this engine; this engine was cut at 28 to 70 s,
  llama.cpp at 45 to 110 s, on the same kind of processor.
- This engine reads an expert at its first use, also without a limit, so the first prompts of a cell are slower (llama.cpp
  loads for 44 s first).
- `transformers + accelerate`: bf16, with the weights that do not fit offloaded to disk. Its one cell ran beside other work for
  a quarter of an hour. A peer without a row was not run on that model.
- Omitted: kt-kernel 0.7.2 installs but contains only kernels; its engine, sglang-kt, needs CUDA.

"""


def default_workloads(limit: str) -> list[str]:
    """Decoding and one prompt length at every limit, the other workloads without one and at a middle one, to save hours."""
    every = [name for name in WORKLOADS if name != "prefill-256"]  # the paper's (benchmarks.paper)
    return every if limit in ("none", "52%") else ["decode", "prefill-512"]


def run(arguments: argparse.Namespace) -> None:
    """Install and prepare each peer once, then measure every cell once a round, in an order drawn anew for each round."""
    console = Console(stderr=True)
    facts = model_facts(arguments.checkpoint)
    results_file: Path = arguments.results or RESULTS / processor_folder(processor_facts()) / f"{facts.name}.json"
    results = begin_or_continue(results_file, facts, arguments)
    limits = [None if text == "none" else parse_amount(text, facts.model_bytes) for text in arguments.limits]
    if (reason := can_limit()) and any(limits):
        console.print(reason)
        limits = [None]
    arguments.home.mkdir(parents=True, exist_ok=True)
    ready: list[tuple[Peer, Path, Path]] = []
    for name in arguments.peers:
        peer = PEERS[name]()
        try:
            ready.append((peer, peer.install(arguments.home), peer.prepare(arguments.checkpoint, arguments.home)))
        except (RuntimeError, OSError) as error:
            console.print(f"{name}: skipped, {error}")
    planned = [
        Planned(peer, python, model, variant, WORKLOADS[name], limit)
        for limit, limit_text in zip(limits, arguments.limits, strict=False)
        for name in arguments.workloads or default_workloads(limit_text)
        for peer, python, model in ready
        for variant in peer.variants(model, limit)
    ]
    run_rounds(planned, results, results_file, arguments)
    print(results_file)


def report(arguments: argparse.Namespace) -> None:
    """Write the page and its pictures from result files."""
    page: Path = arguments.page
    text = HEADER
    for file in arguments.files or sorted(RESULTS.glob("*/*.json")):
        results = Results.load(file)
        links = [f"![{picture.stem}]({os.path.relpath(picture, page.parent)})" for picture in plot(results, file.parent)]
        text += markdown(results) + "\n" + "\n".join(links) + "\n\n"
    page.write_text(text.rstrip() + "\n")
    print(page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure engines side by side.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure")
    add_options(verb, "docs/results/PROCESSOR/MODEL.json")
    verb.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    verb.add_argument("--limits", nargs="+", default=list(LIMITS), help="sizes, fractions of the INT4 size, or none")
    verb.add_argument(
        "--workloads", nargs="+", choices=list(WORKLOADS), help="default: decode and prefill-512 at every limit, all at some"
    )
    verb.set_defaults(do=run)
    verb = verbs.add_parser("report", help="tables and pictures from result files")
    verb.add_argument("files", type=Path, nargs="*", help="result files; default: all under docs/results")
    verb.add_argument("--page", type=Path, default=Path("docs/results/benchmarks.md"))
    verb.set_defaults(do=report)
    verb = verbs.add_parser("peers", help="list the engines")
    verb.set_defaults(do=lambda _: print("\n".join(PEERS)))
    arguments = parser.parse_args(argv)
    try:
        arguments.do(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
