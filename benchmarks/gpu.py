"""The GPU tier on the machine at hand: checks, then measures, and prints one table; needs torch, triton and transformers alone.

    PYTHONPATH=src python -m benchmarks.gpu [--models Qwen3-30B-A3B ...] [--shares 0.45 1.0 ...] [--json FILE] [--seconds N]

Prints the floors first (bytes over measured bandwidth), then what was reached. Random weights; ``gpu_model.py`` says how routing is
made realistic. Times are medians of CUDA events or of whole runs; decode starts after a warm-up in which residency settles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from benchmarks.gpu_model import GEOMETRIES, TOPIC_POWER, RandomModel
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.options import DeviceOptions
from fate_moe.kernels.triton_fetch import fetch_kernel
from fate_moe.models.fused import FusedStep

PROMPT, WARM, MEASURED, LENGTH = 64, 200, 256, 1024

# Each is what its name says in this engine's terms: the same slots, kernels and graph for all of them.
METHODS: dict[str, DeviceOptions] = {
    "load on demand": DeviceOptions(eviction="recency", limit=0, overlap=False),
    "fate": DeviceOptions(eviction="recency", limit=1, num_whole=4, overlap=False),
    "no prefetch": DeviceOptions(limit=0),
    "best": DeviceOptions(),
    "prefetch 2": DeviceOptions(limit=2),
}


def milliseconds(run: Callable[[], Any], repeat: int = 20) -> float:
    """Median time of ``run`` on the device."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeat):
        start, end = _event(), _event()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def captured(run: Callable[[], Any], times: int = 1) -> Callable[[], None]:
    """``run``, ``times`` in a row in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    return graph.replay


def copies(results: dict[str, Any]) -> None:
    """Device copy bandwidth, DMA and zero-copy reads of pinned memory, in GB/s."""
    device = torch.device("cuda")
    halves = torch.empty(2, 1 << 30, dtype=torch.uint8, device=device)
    results["device_copy"] = 2 * halves[0].numel() / milliseconds(lambda: halves[0].copy_(halves[1])) / 1e6
    blob = 4 << 20
    arena, pool = PinnedArena(64, blob, device), VramPool(64, 0, blob, device)
    arena.bytes.random_(0, 255)
    for size in (1 << 20, 4 << 20, 64 << 20):
        took = milliseconds(partial(pool.bytes[:size].copy_, arena.bytes[:size], non_blocking=True))
        results[f"dma_{size >> 20}MiB"] = size / took / 1e6
    for count in (1, 4, 32):
        wanted = torch.tensor([[i, i] for i in range(count)], dtype=torch.int32, device=device)
        number = torch.tensor([count], dtype=torch.int32, device=device)
        for programs in (4, 8, 16, 32, 64):

            def fetch(programs: int = programs, wanted: Any = wanted, number: Any = number) -> None:
                fetch_kernel[(programs,)](arena.bytes, pool.bytes, wanted, number, blob, blob, BLOCK=4096, num_warps=8)

            took = milliseconds(captured(fetch, 4)) / 4
            results[f"fetch_{count}x4MiB_by_{programs}"] = count * blob / took / 1e6
    assert torch.equal(pool.bytes[: 32 * blob].cpu(), arena.bytes[: 32 * blob]), "fetched bytes differ"
    arena.close()


def kernels(random: RandomModel, experts: DeviceExperts, bandwidth: float, results: dict[str, Any]) -> None:
    """The decode kernels against fp64 on real geometry, and their times beside the time their bytes need."""
    from fate_moe.kernels.reference import expert_weights
    from fate_moe.quant.blob import views

    config = random.model.config
    top_k, num_experts = config.num_experts_per_tok, random.stacks[0].num_experts
    shapes = random.stacks[0].output_rows_first()
    x = torch.randn(1, config.hidden_size, device="cuda").bfloat16()
    index = torch.randperm(num_experts)[:top_k].sort().values[None].cuda()
    weights = torch.rand(1, top_k, device="cuda").bfloat16()
    exact, twin = torch.zeros(2, config.hidden_size, dtype=torch.float64)
    for choice in range(top_k):
        made = expert_weights(random.layout, views(random.layout, random.arena.blob(int(index[0, choice]))), shapes, torch.float32)
        for kind, into in ((torch.float64, exact), (torch.bfloat16, twin)):
            gate, up = (x[0].cpu().to(kind) @ made["gate_up_proj"].to(kind).T).chunk(2)
            y = (torch.nn.functional.silu(gate) * up) @ made["down_proj"].to(kind).T
            into += (y * weights[0, choice].cpu().to(kind)).double()
    out = experts.compute(0, x, index, weights)[0].cpu().double()
    error = {"kernel": float((out - exact).norm() / exact.norm()), "twin_bf16": float((twin - exact).norm() / exact.norm())}
    many = experts.compute(0, x.repeat(20, 1), index.repeat(20, 1), weights.repeat(20, 1)).cpu().double()
    error["grouped"] = float((many - exact).norm(dim=1).max() / exact.norm())
    results["relative_error"] = error
    assert max(error["kernel"], error["grouped"]) < 2 * error["twin_bf16"], error
    # Rotate over experts so that the L2 cache does not serve the weights.
    picks = [torch.randperm(num_experts)[:top_k].int().cuda() for _ in range(16)]
    layout = experts.layouts[0]
    weight_bytes = top_k * sum(
        part.shape[0] * part.shape[1] * (part.shape[2] if len(part.shape) > 2 else 2) for part in random.layout.parts
    )
    matrices = {"gate_up": 2 * layout.width * layout.cols, "down": layout.width * layout.cols}
    for name, call in (
        ("gate_up", lambda: experts._gate_up(0, 1, 2)),
        ("down", lambda: experts._down(0, weights, torch.empty_like(x), False)),
    ):

        def sixteen(call: Callable[[], None] = call) -> None:
            for pick in picks:
                experts.slots[:top_k].copy_(pick)
                call()

        def empty() -> None:
            for pick in picks:
                experts.slots[:top_k].copy_(pick)

        took = (milliseconds(captured(sixteen)) - milliseconds(captured(empty))) / 16
        floor = weight_bytes * matrices[name] / sum(matrices.values()) / bandwidth / 1e6 * 1
        results[f"{name}_us"], results[f"{name}_floor_us"] = took * 1e3, floor * 1e3


def decode(random: RandomModel, cache: Any, share: float, options: DeviceOptions) -> dict[str, Any]:
    """One cell: tokens a second with ``share`` of the experts resident."""
    experts = random.experts(share, options)
    fused = FusedStep(random.model, experts, cache)
    fused.script = random.script[: fused.tokens.numel()]
    fused.begin(int(random.script[PROMPT]), PROMPT)
    fused.capture()
    fused.begin(int(random.script[PROMPT]), PROMPT)
    for _ in range(WARM):
        fused.replay()
    before = experts.counters()
    start, end = _event(), _event()
    start.record()
    for _ in range(MEASURED):
        fused.replay()
    end.record()
    end.synchronize()
    experts.tables.check_integrity()
    counted = experts.counters().since(before)
    took = start.elapsed_time(end) / MEASURED
    return {
        "tokens_per_second": 1e3 / took,
        "ms": took,
        "ready": counted.ready_on_time,
        "misses_per_token": counted.misses / MEASURED,
        "prefetched_per_token": counted.prefetched / MEASURED,
        "prefetch_used": counted.prefetch_used / max(1, counted.prefetched),
        "copy_ms": counted.bytes_read / MEASURED / 50e6,
        "tokens": fused.tokens[PROMPT + 1 : PROMPT + WARM + MEASURED].tolist(),
        "logits": fused.logits.double().sum().item(),
    }


def launches(fused: FusedStep) -> int:
    """Kernels of one replayed step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fused.replay()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_time_total > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=GEOMETRIES, default=["Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B"])
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.75, 0.45, 0.25, 0.15])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, help="fewer layers than the geometry has")
    parser.add_argument("--prefill", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--topic-power", type=float, default=TOPIC_POWER, help="how alike a topic's tokens are (gpu_model.py)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new cell after this long")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "transformers": transformers.__version__, "copies": {}, "models": {},
    }  # fmt: skip

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))

    copies(results["copies"])
    save()
    for name in arguments.models:
        made = time.perf_counter()
        random = RandomModel.make(name, arguments.layers, arguments.topic_power)
        result: dict[str, Any] = {"make_seconds": time.perf_counter() - made, "cells": {}}
        results["models"][name] = result
        _measure(random, arguments, began, results["copies"], result, save)
        random.arena.close()
        del random
        torch.cuda.empty_cache()
    save()
    print(json.dumps({"device": results["device"], "copies": {k: round(v, 1) for k, v in results["copies"].items()}}))
    for name, result in results["models"].items():
        cells = result.pop("cells")
        print(name, json.dumps(result))
        for cell, row in cells.items():
            print(f"  {cell:32} " + "  ".join(f"{key} {value:.3g}" for key, value in row.items()))


def _measure(
    random: RandomModel,
    arguments: argparse.Namespace,
    began: float,
    copied: dict[str, float],
    result: dict[str, Any],
    save: Callable[[], None],
) -> None:
    config = random.model.config
    whole = random.experts(1.0, DeviceOptions(num_whole=0))
    kernels(random, whole, copied["device_copy"], result)
    cache = transformers.StaticCache(config=config, max_cache_len=LENGTH)
    prompt = random.script[None, :PROMPT]
    with torch.no_grad():
        random.model(prompt, past_key_values=cache)
        # The fused step and transformers' own layers, on the same experts and cache.
        own = transformers.StaticCache(config=config, max_cache_len=LENGTH)
        random.model(prompt, past_key_values=own)
        expected = random.model(random.script[None, PROMPT : PROMPT + 1], past_key_values=own).logits[0, -1].float()
    result["similarity"] = _similarity(random)
    fused = FusedStep(random.model, whole, cache)
    fused.begin(int(random.script[PROMPT]), PROMPT)
    fused.step()
    result["fused_error"] = float((fused.logits - expected).norm() / expected.norm())
    fused.begin(int(random.script[PROMPT]), PROMPT)
    fused.capture()
    result["launches"] = launches(fused)
    dense = (
        sum(value.numel() for value in random.model.parameters() if value.device.type == "cuda")
        - config.vocab_size * config.hidden_size
    )
    token_bytes = 2 * dense + len(random.stacks) * config.num_experts_per_tok * random.layout.length
    result["floor_ms"] = token_bytes / copied["device_copy"] / 1e6
    del fused, whole
    save()
    reference, resident = None, float("nan")
    for share in arguments.shares:
        for method in ["no prefetch"] if share == 1.0 else arguments.methods:
            if time.perf_counter() - began > arguments.seconds:
                result["cut"] = True
                continue
            torch.cuda.empty_cache()
            row = decode(random, cache, share, METHODS[method])
            told = (row.pop("tokens"), row.pop("logits"))
            reference = reference or told
            row["same_as_resident"] = float(told == reference)
            if share == 1.0:
                resident = row["ms"]
            elif row["copy_ms"]:
                row["of_resident"] = resident / row["ms"]
                row["copies_hidden"] = 1 - (row["ms"] - resident) / row["copy_ms"]
            result["cells"][f"{share:.2f} {method}"] = row
            save()
    for tokens in arguments.prefill:
        for share in (1.0, 0.25):
            if time.perf_counter() - began < arguments.seconds:
                result["cells"][f"{share:.2f} prefill {tokens}"] = prefill(random, share, tokens)
                save()


def prefill(random: RandomModel, share: float, tokens: int) -> dict[str, Any]:
    """Seconds until a prompt of ``tokens`` has been read, through transformers' own layers."""
    torch.cuda.empty_cache()
    experts = random.experts(share, replace(DeviceOptions(), num_whole=0))
    prompt = random.script[None, :tokens]
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            random.model(
                prompt, past_key_values=transformers.StaticCache(config=random.model.config, max_cache_len=tokens), logits_to_keep=1
            )
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    took = min(times[1:])
    missing = (1 - experts.tables.num_slots / random.arena.num_blobs) * random.arena.bytes.numel()
    return {"tokens_per_second": tokens / took, "ms": took * 1e3, "copy_ms_at_50GBs": missing / 50e6}


def _similarity(random: RandomModel) -> dict[str, float]:
    """Of neighbouring gate inputs in prefill: mean cosine, and how many of a layer's choices its router's top-k, 2k on the one
    before has."""
    inputs: list[torch.Tensor] = []
    hooks = [
        random.model.get_submodule(stack.block).register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].float()))
        for stack in random.stacks
    ]
    with torch.no_grad():
        random.model(random.script[None, :256], logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    top_k = random.model.config.num_experts_per_tok
    cosines, recall, wide, overlap = [], [], [], []
    for layer in range(1, len(inputs)):
        gate = random.model.get_submodule(random.stacks[layer].block).gate.weight.float()
        cosines.append(torch.cosine_similarity(inputs[layer - 1], inputs[layer]).mean())
        real = torch.zeros(inputs[layer].shape[0], gate.shape[0], device="cuda")
        real.scatter_(1, (inputs[layer] @ gate.T).topk(top_k).indices, 1)
        guess = inputs[layer - 1] @ gate.T
        recall.append(real.gather(1, guess.topk(top_k).indices).sum(1).mean() / top_k)
        wide.append(real.gather(1, guess.topk(2 * top_k).indices).sum(1).mean() / top_k)
        overlap.append((real[1:] * real[:-1]).sum(1).mean() / top_k)
    pairs = {"cosine": cosines, "recall_k": recall, "recall_2k": wide, "previous_token": overlap}
    return {name: float(torch.stack(values).mean()) for name, values in pairs.items()}


if __name__ == "__main__":
    main()
