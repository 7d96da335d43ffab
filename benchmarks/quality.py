"""Quality against bytes: what solvers, calibration, shorter views and precision policies cost the embedded model and save it.

    python -m benchmarks.quality prepare STORES --calibrate TEXT
    python -m benchmarks.quality measure STORES TEXT... --out docs/quality.json [--picture docs/quality.png]

``prepare`` makes the stores and the table of weight errors, ``measure`` the perplexities; the picture is drawn from the JSON alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fate_moe import demo
from fate_moe.core import Need
from fate_moe.kernels.reference import dequantize
from fate_moe.models.calibrate import calibrate
from fate_moe.models.evaluate import perplexity
from fate_moe.models.load import load, load_tokenizer, store_for
from fate_moe.quant.planes import pack
from fate_moe.quant.solver import SOLVERS
from fate_moe.store.convert import convert
from fate_moe.store.plan import make_plan
from fate_moe.store.source import Checkpoint

WIDTHS = (2, 1, 1)
# Name, store, precision policy or the bits of a view that all experts are read as.
WINDOWS: list[tuple[str, str, str | int]] = [
    ("lossless", "lossless", "full"),
    ("INT4, min/max", "minmax-64", "full"),
    ("INT4, HQQ", "hqq-64", "full"),
    ("INT4, HQQ, groups of 32", "hqq-32", "full"),
    ("INT4, HQQ, groups of 128", "hqq-128", "full"),
    ("INT4, HQQ, calibrated", "calibrated-64", "full"),
    ("prefill-popularity, 3 bits", "hqq-64", "prefill-popularity"),
    ("3-bit view of all", "hqq-64", 3),
    ("2-bit view of all", "hqq-64", 2),
]
DECODE: list[tuple[str, str, str | int]] = [
    ("lossless", "lossless", "full"),
    ("INT4", "hqq-64", "full"),
    ("gate-weighted", "hqq-64", "gate-weighted"),
    ("budget", "hqq-64", "budget"),
    ("3-bit view of all", "hqq-64", 3),
    ("2-bit view of all", "hqq-64", 2),
]


class View:
    """A precision policy for measuring: every expert as the same view."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        return [self._bits] * len(needs)


def prepare(folder: Path, text: Path) -> dict[str, Any]:
    """All stores of the embedded model under ``folder``; how long the conversions took."""
    facts: dict[str, Any] = {}
    lossless = convert(demo.MODEL, folder / "lossless")
    tokens = torch.tensor(load_tokenizer(lossless)(text.read_text())["input_ids"][:4096])
    began = time.perf_counter()
    found = calibrate(store_for(lossless, "lossless"), tokens)
    facts["calibrate_seconds"] = time.perf_counter() - began
    for solver, size, calibration in (
        ("minmax", 64, None),
        ("hqq", 64, None),
        ("hqq", 32, None),
        ("hqq", 128, None),
        ("hqq", 64, found),
    ):
        name = f"{'calibrated' if calibration else solver}-{size}"
        began = time.perf_counter()
        convert(demo.MODEL, folder / name, "int4", solver=solver, group_size=size, calibration=calibration)
        facts[f"convert_seconds {name}"] = time.perf_counter() - began
    facts["errors"] = weight_errors()
    return facts


def weight_errors() -> list[dict[str, Any]]:
    """Relative error of the weights and of x W^T for Gaussian x, by model, solver, group size and view."""
    generator = torch.Generator().manual_seed(0)
    plan = make_plan(Checkpoint(demo.MODEL), "lossless")
    trained = [plan.make_experts(shard.stack, 0, {})["gate_up_proj"].float() for shard in plan.shards]
    uniform = (torch.rand(512, 256, generator=generator) * 2 - 1) / 16
    models = {
        "embedded, gate and up": torch.cat(trained),
        "random, normal": torch.randn(512, 256, generator=generator) / 16,
        "random, uniform": uniform,
    }
    rows = []
    for name, weights in models.items():
        x = torch.randn(64, weights.shape[1], generator=generator)
        for solver in ("minmax", "hqq"):
            for size in (32, 64, 128):
                codes, scale, zero = SOLVERS[solver](weights, 4, size)
                planes = pack(codes, size, WIDTHS)
                row: dict[str, Any] = {"model": name, "solver": solver, "group_size": size}
                for bits, used in ((4, 3), (3, 2), (2, 1)):
                    made = dequantize(planes, scale, zero, cols=weights.shape[1], group_size=size, widths=WIDTHS, num_planes=used)
                    row[f"weights_{bits}"] = float((made - weights).norm() / weights.norm())
                    row[f"outputs_{bits}"] = float((x @ (made - weights).T).norm() / (x @ weights.T).norm())
                rows.append(row)
    return rows


def measure(
    folder: Path, texts: Sequence[Path], window_tokens: int, decode_tokens: int, write: Callable[[dict[str, Any]], None]
) -> None:
    """Perplexity (of the texts' mean loss), bytes and tokens per second of every line; ``write`` is given all so far after each."""
    found: dict[str, Any] = {}
    for kind, lines, most in (("windows", WINDOWS, window_tokens), ("decode", DECODE, decode_tokens)):
        found[kind] = []
        for name, store, policy in lines:
            named = policy if isinstance(policy, str) else "full"
            model, tokenizer = load(
                folder / store, expert_cache="25%", preset="load-on-demand", context_length=1024, precision_policy=named
            )
            if not isinstance(policy, str):
                model.fate.runtime.tailor.policy = View(policy)
            parts = [torch.tensor(tokenizer(text.read_text()[:40_000])["input_ids"][:most]) for text in texts]
            results = [perplexity(model, tokens, decode=kind == "decode") for tokens in parts]
            report = model.fate.report()
            model.fate.close()
            count = sum(result.tokens for result in results)
            row = {
                "name": name,
                "perplexity": math.exp(sum(result.loss for result in results) / len(results)),
                "by_text": {text.stem: result.perplexity for text, result in zip(texts, results, strict=True)},
                "tokens": count,
                "tokens_per_second": count / sum(result.seconds for result in results),
                "bytes_per_token": report.experts.bytes_read / count,
                "uses_by_bits": report.uses_by_bits,
            }
            found[kind].append(row)
            write(found)
            print(
                kind,
                name,
                f"{row['perplexity']:.3f} {row['bytes_per_token'] / 1024:.0f} KiB {row['tokens_per_second']:.1f}/s",
                flush=True,
            )


def draw(facts: dict[str, Any], path: Path) -> None:
    """Perplexity against bytes read per token, in prefill and in decode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4))
    for axes, kind, title in zip(panels, ("windows", "decode"), ("windows of 512 tokens", "token by token"), strict=True):
        for row in facts[kind]:
            x, y = row["bytes_per_token"] / 1024, row["perplexity"]
            axes.plot(x, y, "o", color="tab:blue")
            axes.annotate(row["name"], (x, y), textcoords="offset points", xytext=(6, 3), fontsize=7)
        axes.set_xscale("log")
        axes.set_title(title)
        axes.set_xlabel("KiB read per token, 25 % of the experts resident")
        axes.set_ylabel("perplexity")
        axes.margins(0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "measure"))
    parser.add_argument("stores", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--window-tokens", type=int, default=2048)
    parser.add_argument("--decode-tokens", type=int, default=384)
    arguments = parser.parse_args()
    facts = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.what == "prepare":
        facts |= prepare(arguments.stores, arguments.calibrate)
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    else:

        def write(found: dict[str, Any]) -> None:
            arguments.out.write_text(json.dumps(facts | found, indent=1) + "\n")

        measure(arguments.stores, arguments.texts, arguments.window_tokens, arguments.decode_tokens, write)
    if arguments.picture:
        facts = json.loads(arguments.out.read_text())
        draw(facts, arguments.picture)


if __name__ == "__main__":
    main()
