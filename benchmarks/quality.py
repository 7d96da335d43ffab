"""Quality against bytes read, for solvers, calibration, shorter views and precision policies.

    python -m benchmarks.quality STORES TEXT... --calibrate TEXT --out docs/results/quality.json [--page docs/results/quality.md]
                                 [--picture docs/results/quality.png] [--model NAME=CHECKPOINT]

Measures the embedded model, and with fewer stores every checkpoint that --model names. Results that the JSON already has are not
measured again, so an interrupted run continues; delete the file to start anew. Tables and picture are made from the JSON alone
(benchmarks/quality_page.py).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_page import draw, fill_page
from fate_moe import demo
from fate_moe.checkpoints.source import Checkpoint
from fate_moe.core import PrecisionPolicy
from fate_moe.engine.load import load
from fate_moe.engine.prepare import is_store, load_tokenizer
from fate_moe.kernels.reference import dequantize
from fate_moe.machine import peak_memory
from fate_moe.memory.precision import Budget, FixedView, PrefillPopularity, RoutingWeighted
from fate_moe.quant.planes import pack
from fate_moe.quant.solver import SOLVERS
from fate_moe.store.convert import convert
from fate_moe.store.learned import save_view_losses
from fate_moe.store.open import open_store
from fate_moe.store.plan import plan_conversion
from fate_moe.tools.calibrate import calibrate, measure_view_losses
from fate_moe.tools.evaluate import perplexity

WIDTHS = (2, 1, 1)
CALIBRATION_TOKENS = 18724  # codes are chosen on 16,384 of them; the losses of views are measured on the last eighth
# By name: precision, solver, group size, whether it is calibrated. Models other than the embedded one get the first five.
STORES: dict[str, tuple[str, str, int, bool]] = {
    "lossless": ("lossless", "hqq", 64, False),
    "hqq-64": ("int4", "hqq", 64, False),
    "int8": ("int8", "hqq", 64, False),
    "calibrated-64": ("int4", "hqq", 64, True),
    "calibrated-32": ("int4", "hqq", 32, True),
    "minmax-64": ("int4", "minmax", 64, False),
    "hqq-32": ("int4", "hqq", 32, False),
    "hqq-128": ("int4", "hqq", 128, False),
}
NUM_FOR_OTHERS = 5
# Name, store, and either a precision policy (by name: it chooses by view losses; an object: it does not) or the bits of all views.
Line = tuple[str, str, str | PrecisionPolicy | int]
LINES: dict[str, list[Line]] = {
    "windows": [
        ("lossless", "lossless", "full"),
        ("INT8", "int8", "full"),
        ("INT4", "hqq-64", "full"),
        ("INT4, calibrated", "calibrated-64", "full"),
        ("INT4, min/max", "minmax-64", "full"),
        ("INT4, groups of 32", "hqq-32", "full"),
        ("INT4, groups of 128", "hqq-128", "full"),
        ("INT4, calibrated, groups of 32", "calibrated-32", "full"),
        ("prefill-popularity", "hqq-64", "prefill-popularity"),
        ("budget", "hqq-64", "budget"),
        ("prefill-popularity, a quarter", "hqq-64", PrefillPopularity(0.25)),
        ("budget, any view", "hqq-64", Budget()),
        ("calibrated, prefill-popularity", "calibrated-64", "prefill-popularity"),
        ("calibrated, prefill-popularity, a quarter", "calibrated-64", PrefillPopularity(0.25)),
        ("calibrated, budget", "calibrated-64", "budget"),
        ("calibrated, 3-bit view of all", "calibrated-64", 3),
        ("calibrated, 2-bit view of all", "calibrated-64", 2),
        ("3-bit view of all", "hqq-64", 3),
        ("2-bit view of all", "hqq-64", 2),
    ],
    "decode": [
        ("lossless", "lossless", "full"),
        ("INT8", "int8", "full"),
        ("INT4", "hqq-64", "full"),
        ("INT4, calibrated", "calibrated-64", "full"),
        ("routing-weighted", "hqq-64", "routing-weighted"),
        ("budget", "hqq-64", "budget"),
        ("INT4, calibrated, groups of 32", "calibrated-32", "full"),
        ("calibrated, routing-weighted", "calibrated-64", "routing-weighted"),
        ("calibrated, routing-weighted at 0.6, 0.8, 1.2", "calibrated-64", RoutingWeighted(0.6, 0.8, 1.2)),
        ("calibrated, routing-weighted at 0.8, none, 1.6", "calibrated-64", RoutingWeighted()),
        ("calibrated, budget", "calibrated-64", "budget"),
        ("calibrated, groups of 32, routing-weighted", "calibrated-32", "routing-weighted"),
        ("calibrated, 3-bit view of all", "calibrated-64", 3),
        ("calibrated, 2-bit view of all", "calibrated-64", 2),
        ("3-bit view of all", "hqq-64", 3),
        ("2-bit view of all", "hqq-64", 2),
    ],
}


def prepare(source: Path, folder: Path, names: Sequence[str], text: Path, facts: dict[str, Any], write: Callable[[], None]) -> None:
    """Make the stores ``names`` of ``source`` under ``folder`` and add the cost of each conversion to ``facts``.

    Each conversion runs in its own process, so that the peak memory is its own (with that of torch, transformers and Python).
    Megabytes per second refer to the weights in the lossless store.
    """
    for name in names:
        if is_store(folder / name):
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            took = alone.submit(timed_conversion, source, folder, name, text).result()
        weights = open_store(folder / "lossless").manifest
        took["source_mb_per_second"] = (weights.expert_bytes + weights.dense_bytes) / 1e6 / took["seconds"]
        facts.setdefault("conversions", {})[name] = took
        write()


def timed_conversion(source: Path, folder: Path, name: str, text: Path) -> dict[str, Any]:
    """Make the store ``name`` under ``folder`` and return the seconds and this process's peak memory.

    A calibrated store needs the lossless one in ``folder``; its seconds of running the text are reported separately.
    """
    precision, solver, size, calibrated = STORES[name]
    calibration, took, tokens = None, {}, torch.empty(0)
    if calibrated:
        began = time.perf_counter()
        tokens = torch.tensor(
            load_tokenizer(folder / "lossless")(text.read_text(), verbose=False)["input_ids"][:CALIBRATION_TOKENS]
        )
        calibration = calibrate(folder / "lossless", tokens[: -(len(tokens) // 8)])
        took["calibrate_seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    convert(source, folder / name, precision, solver=solver, group_size=size, calibration=calibration, progress=False)
    took["seconds"] = time.perf_counter() - began
    if calibrated:
        began = time.perf_counter()
        save_view_losses(folder / name, measure_view_losses(folder / name, tokens[-(len(tokens) // 8) :]))
        took["views_seconds"] = time.perf_counter() - began
    return {**took, "peak_mib": peak_memory() / 2**20}


def weight_errors() -> list[dict[str, Any]]:
    """Relative error of the weights and of x W^T for Gaussian x, by model, solver, group size and bits (8: INT8)."""
    generator = torch.Generator().manual_seed(0)
    plan = plan_conversion(Checkpoint(demo.MODEL), "lossless")
    trained = [plan.make_expert(shard.stack, 0, {})["gate_up_proj"].float() for shard in plan.shards]
    models = {
        "embedded, gate and up": torch.cat(trained),
        "random, normal": torch.randn(512, 256, generator=generator) / 16,
        "random, uniform": (torch.rand(512, 256, generator=generator) * 2 - 1) / 16,
    }
    rows = []
    for name, weights in models.items():
        x = torch.randn(64, weights.shape[1], generator=generator)
        for solver in ("minmax", "hqq"):
            for size in (32, 64, 128):
                row: dict[str, Any] = {"model": name, "solver": solver, "group_size": size}
                for widths, views in (((8,), {8: 1}), (WIDTHS, {4: 3, 3: 2, 2: 1})):
                    codes, scale, zero = SOLVERS[solver](weights, sum(widths), size)
                    planes = pack(codes, size, widths)
                    for bits, used in views.items():
                        restored = dequantize(
                            planes, scale, zero, cols=weights.shape[1], group_size=size, widths=widths, num_planes=used
                        )
                        row[f"weights_{bits}"] = float((restored - weights).norm() / weights.norm())
                        row[f"outputs_{bits}"] = float((x @ (restored - weights).T).norm() / (x @ weights.T).norm())
                rows.append(row)
    return rows


def measure(
    store: Path, policy: str | PrecisionPolicy | int, texts: Sequence[Path], max_tokens: int, *, decode: bool
) -> dict[str, Any]:
    """Perplexity (of the texts' mean loss) of ``store`` on ``max_tokens`` tokens of each text, bytes read and tokens per second."""
    named = policy if isinstance(policy, str) else "routing-weighted"
    model, tokenizer = load(store, expert_cache="25%", preset="load-on-demand", context_length=1024, precision_policy=named)
    if not isinstance(policy, str):
        model.fate.runtime.view_selector.policy = FixedView(policy) if isinstance(policy, int) else policy
    parts = [torch.tensor(tokenizer(text.read_text()[:40_000], verbose=False)["input_ids"][:max_tokens]) for text in texts]
    results = [perplexity(model, tokens, decode=decode) for tokens in parts]
    report = model.fate.report()
    model.fate.close()
    count = sum(result.tokens for result in results)
    return {
        "perplexity": math.exp(sum(result.loss for result in results) / len(results)),
        "by_text": {text.stem: result.perplexity for text, result in zip(texts, results, strict=True)},
        "tokens": count,
        "tokens_per_second": count / sum(result.seconds for result in results),
        "bytes_per_token": report.experts.bytes_read / count,
        "uses_by_bits": report.uses_by_bits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=CHECKPOINT", help="besides the embedded one")
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="rewrite this page's tables")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--window-tokens", type=int, default=1536)
    parser.add_argument("--decode-tokens", type=int, default=320)
    arguments = parser.parse_args()
    facts: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}

    def write() -> None:
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")

    facts.setdefault("errors", weight_errors())
    others = dict(model.split("=", 1) for model in arguments.model)
    for name, source in {"embedded": demo.MODEL, **others}.items():
        model_facts = facts.setdefault("models", {}).setdefault(name, {})
        stores = list(STORES) if name == "embedded" else list(STORES)[:NUM_FOR_OTHERS]
        prepare(Path(source), arguments.stores / name, stores, arguments.calibrate, model_facts, write)
        for kind, lines in LINES.items():
            max_tokens = arguments.decode_tokens if kind == "decode" else arguments.window_tokens
            rows = model_facts.setdefault(kind, [])
            known = {row["name"] for row in rows}
            for line, store, policy in lines:
                if line in known or store not in stores:
                    continue
                result = measure(arguments.stores / name / store, policy, arguments.texts, max_tokens, decode=kind == "decode")
                rows.append({"name": line, **result})
                write()
                print(f"{name}, {kind}, {line}: {result['perplexity']:.3f}, {result['tokens_per_second']:.1f} tokens/s", flush=True)
            rows.sort(key=lambda row: [line for line, _, _ in lines].index(row["name"]))
    write()
    for path, make in ((arguments.page, fill_page), (arguments.picture, draw)):
        if path:
            make(facts, path)


if __name__ == "__main__":
    main()
