"""The experts' kernels alone on this GPU: are they the twin's to the bit, and how long do they take?

    PYTHONPATH=src python -m benchmarks.gpu_kernels [--models Qwen3-30B-A3B ...] [--precisions int4 int8] [--json FILE]

One layer of a published geometry with random weights, all resident. Decode reads other experts in every launch, so that none is in
the second-level cache. The last line is one JSON; exit code 1 if any number differs from the twin's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu_measure import captured, milliseconds
from benchmarks.gpu_model import GEOMETRIES, RandomModel
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.options import DeviceOptions
from fate_moe.kernels.reference import quantized_experts
from fate_moe.quant.blob import views

ROUNDS = 16
PROMPT = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=GEOMETRIES, default=["Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B"])
    parser.add_argument("--precisions", nargs="+", choices=["int4", "int8"], default=["int4", "int8"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    for name in arguments.models:
        for precision in arguments.precisions:
            random = RandomModel.make(name, num_layers=1, length=64, precision=precision)
            experts = random.experts(1.0, DeviceOptions())
            row = {"differ": list(differences(random, experts)), **decode(random, experts), **prompt(random, experts)}
            found[f"{name} {precision}"] = row
            print(name, precision, row, flush=True)
            random.close()
            del random, experts
            torch.cuda.empty_cache()
    print(json.dumps(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return int(any(row["differ"] for row in found.values() if isinstance(row, dict)))


def differences(random: RandomModel, experts: DeviceExperts) -> Iterator[str]:
    """Where the device's sums are not the twin's."""
    num_experts, top_k = random.stacks[0].num_experts, random.model.config.num_experts_per_tok

    def parts(expert: int) -> dict[str, torch.Tensor]:
        return views(random.layout, random.arena.blob(expert))

    for tokens in (1, 3, 17, 40):
        x = torch.randn(tokens, random.model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
        index = torch.stack([torch.randperm(min(num_experts, 2 * top_k), device="cuda")[:top_k] for _ in range(tokens)])
        weights = torch.rand(tokens, top_k, device="cuda").to(torch.bfloat16)
        got = experts.compute(0, x, index, weights).cpu()
        want = quantized_experts(random.layout, parts, x.cpu(), index.cpu(), weights.cpu())
        if not torch.equal(got, want):
            yield f"{tokens} tokens: {int((got != want).sum())} of {got.numel()}, by up to {(got - want).abs().max().item():.1e}"


def decode(random: RandomModel, experts: DeviceExperts) -> dict[str, float]:
    """Microseconds of one token's two launches: each repeated alone, and both in turns."""
    state, layout, top_k = experts.state, experts.state.layouts[0], random.model.config.num_experts_per_tok
    hidden = torch.randn(1, layout.cols, device="cuda", dtype=torch.bfloat16)
    index = torch.arange(top_k, device="cuda")[None]
    weights = torch.rand(1, top_k, device="cuda").to(torch.bfloat16)
    out = torch.empty_like(hidden)
    experts.compute(0, hidden, index, weights)
    order = torch.randperm(state.tables.num_experts, device="cuda")
    some = [order[start : start + top_k].int().contiguous() for start in range(0, len(order) - top_k + 1, top_k)]
    kept = state.slots

    def all_of(launch: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for slots in some:
                state.slots = slots
                launch()

        return run

    def gate_up() -> None:
        experts._gate_up(0, 1, 2)

    def down() -> None:
        experts._down(0, weights, out, False)

    def both() -> None:
        gate_up()
        down()

    times = {}
    for name, launch in (("gate_up_us", gate_up), ("down_us", down), ("both_us", both)):
        times[name] = round(milliseconds(captured(all_of(launch), ROUNDS)) * 1e3 / ROUNDS / len(some), 2)
    state.slots = kept
    return times


def kernels(random: RandomModel, experts: DeviceExperts, bandwidth: float, results: dict[str, Any]) -> None:
    """Add to ``results``: differences from the twin, a token's launches, the time to read their bytes at ``bandwidth`` GB/s."""
    layout = experts.state.layouts[0]
    results["differ"] = list(differences(random, experts))
    results |= decode(random, experts)
    read = random.model.config.num_experts_per_tok * random.layout.length / bandwidth / 1e3
    shares = {"gate_up": 2 * layout.width * layout.cols, "down": layout.width * layout.cols}
    results |= {f"{name}_floor_us": read * share / sum(shares.values()) for name, share in shares.items()}


def prompt(random: RandomModel, experts: DeviceExperts) -> dict[str, Any]:
    """Microseconds of a layer's experts for PROMPT tokens."""
    state, top_k = experts.state, random.model.config.num_experts_per_tok
    hidden = torch.randn(PROMPT, random.model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(state.tables.num_experts, device="cuda")[:top_k] for _ in range(PROMPT)])
    weights = torch.rand(PROMPT, top_k, device="cuda").to(torch.bfloat16)
    return {"prompt_us": round(milliseconds(captured(lambda: experts.compute(0, hidden, index, weights), 4)) * 250)}


if __name__ == "__main__":
    raise SystemExit(main())
