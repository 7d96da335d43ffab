"""Checks and measures the GPU tier on this machine and prints one table; needs only torch, triton and transformers.

    PYTHONPATH=src python -m benchmarks.gpu [--models Qwen3-30B-A3B ...] [--shares 0.45 1.0 ...] [--json FILE] [--seconds N]

Prints the floors first (bytes over measured bandwidth), then the results. Weights are random; ``gpu_model.py`` describes how
routing is made realistic. Times are medians of CUDA events or of whole runs; decode starts after a warm-up in which residency
becomes steady. Methods with "host" compute misses on the host and need the C++ extension.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from benchmarks.gpu_kernels import kernels
from benchmarks.gpu_measure import copies, copy_microseconds, event, host_answers, launches, overlap, prompt_parts
from benchmarks.gpu_model import GEOMETRIES, TOPIC_POWER, RandomModel
from benchmarks.gpu_peers import accelerated, activation_paths
from benchmarks.gpu_routing import as_array, belady_misses, better_gates, fit_gates, predicted, recorded
from fate_moe.errors import FateError
from fate_moe.gpu.dense import ByteLinear
from fate_moe.gpu.host_trial import run_host_trial
from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.prefetch_trial import run_prefetch_trial
from fate_moe.gpu.tables import layer_quotas
from fate_moe.kernels.native import native
from fate_moe.layers.cuda_path_step import PathStep
from fate_moe.layers.cuda_step import FusedStep

PROMPT, LENGTH = 64, 1024

# Each method as options of this engine; slots, kernels and graph are the same for all.
METHODS: dict[str, DeviceOptions] = {
    "load on demand": DeviceOptions(eviction="recency", limit=0, overlap=False),
    "eap": DeviceOptions(eviction="frequency"),
    "fate": DeviceOptions(eviction="recency", limit=1, num_whole=4, overlap=False),
    "no prefetch": DeviceOptions(limit=0),
    "best": DeviceOptions(),
    "always ahead": DeviceOptions(),  # as best, but whether copying ahead pays is not asked (gpu/prefetch_trial.py)
    "counted": DeviceOptions(eviction="frequency"),  # as best before the router's probabilities were weighed
    "fitted": DeviceOptions(),  # next layer's choice by gates fitted to this model
    "prefetch 2": DeviceOptions(limit=2),
    "host": DeviceOptions(host_compute=0.5),
    "measured": DeviceOptions(host_compute=None),  # what the product does (gpu/host_trial.py)
    "slow link": DeviceOptions(fetch_programs=1),  # about a quarter of the link
    "slow link, measured": DeviceOptions(fetch_programs=1, host_compute=None),
    "host, prefetch 2": DeviceOptions(limit=2, host_compute=0.7),
}
_PROFILED = ("load on demand", "best", "measured")  # a profile takes as long as a cell


def decode(
    random: RandomModel, cache: Any, share: float, method: str, learned: dict[str, Any], warm: int, measured: int
) -> tuple[dict[str, Any], Any]:
    """One cell: its results with the fraction ``share`` of the experts resident, and (the tokens it wrote, its last logits).

    ``learned`` are activation paths for "eap" and gates for "fitted"."""
    experts = random.experts(share, METHODS[method], learned["fitted"] if method == "fitted" else ())
    step = PathStep(random.model, experts, cache, learned["eap"]) if method == "eap" else FusedStep(random.model, experts, cache)
    step.script = random.script[: step.tokens.numel()]
    first = int(random.script[PROMPT])

    def one_token() -> None:
        step.begin(first, PROMPT)
        step.replay()

    began = time.perf_counter()
    run_host_trial(experts)
    trial_seconds = time.perf_counter() - began
    if METHODS[method].host_compute is None and experts.state.host_compute is None:
        random.host = None  # its threads were stopped
    step.begin(first, PROMPT)
    if method == "always ahead":
        step.capture()
    else:
        run_prefetch_trial(experts, step.capture, one_token)
    step.begin(first, PROMPT)
    for _ in range(warm):
        step.replay()
    before, hosted = experts.state.counters(), experts.state.tables.hosted()
    start, end = event(), event()
    start.record()
    for _ in range(measured):
        step.replay()
    end.record()
    end.synchronize()
    experts.state.tables.check_integrity()
    counted = experts.state.counters().since(before)
    took = start.elapsed_time(end) / measured
    row = {
        "tokens_per_second": 1e3 / took,
        "ms": took,
        "hosted_of": "/".join(map(str, experts.state.shares[: experts.state.top_k + 1].tolist())),
        "trial_seconds": trial_seconds,
        "copied_ahead": experts.state.options.limit,
        "admit_every": experts.state.options.admit_every,
        "ready": counted.ready_on_time,
        "misses_per_token": counted.misses / measured,
        "hosted_per_token": (experts.state.tables.hosted() - hosted) / measured,
        "prefetched_per_token": counted.prefetched / measured,
        "prefetch_used": counted.prefetch_used / max(1, counted.prefetched),
        "link_ms_at_50GBs": counted.bytes_read / measured / 50e6,
    }
    output = step.tokens[PROMPT + 1 : PROMPT + warm + measured].tolist(), step.logits.clone()
    return row | (overlap(step) if method in _PROFILED else {}), output


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=GEOMETRIES, default=["Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B"])
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.75, 0.45, 0.25, 0.15])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--warm", type=int, default=200, help="tokens before the timed ones, for a steady residency")
    parser.add_argument("--measured", type=int, default=256, help="tokens that are timed")
    parser.add_argument("--layers", type=int, help="fewer layers than the geometry has")
    parser.add_argument("--prefill", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--prefill-methods", nargs="+", choices=METHODS, default=["best"])
    parser.add_argument("--peer", type=float, nargs="*", default=[0.25], help="fractions of experts in VRAM to run accelerate with")
    parser.add_argument("--peer-layers", type=int, help="fewer layers for accelerate, whose experts are bf16 in host memory")
    parser.add_argument("--experts", nargs="+", choices=["int4", "int8"], default=["int4"], help="precision of the routed experts")
    parser.add_argument("--dense", nargs="+", choices=["bf16", "int8"], default=["bf16"], help="precision of all other matrices")
    parser.add_argument("--cells-only", action="store_true", help="omit copies, kernels and all else that is not a cell")
    parser.add_argument(
        "--topic-power", type=float, default=TOPIC_POWER, help="how similar the tokens of a topic are (gpu_model.py)"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new cell after this time")
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

    if not arguments.cells_only:
        copies(results["copies"])
        save()
    for name, experts, dense in itertools.product(arguments.models, arguments.experts, arguments.dense):
        made = time.perf_counter()
        random = RandomModel.make(name, arguments.layers, arguments.topic_power, precision=experts, dense=dense)
        result: dict[str, Any] = {"make_seconds": time.perf_counter() - made, "cells": {}}
        results["models"][f"{name}, experts {experts}, dense {dense}"] = result
        _measure(random, arguments, began, results["copies"], result, save)
        random.close()
        del random
        torch.cuda.empty_cache()
        for share in arguments.peer:
            if time.perf_counter() - began < arguments.seconds:
                result["cells"][f"{share:.2f} accelerate, bf16"] = accelerated(
                    name, share, arguments.peer_layers or arguments.layers
                )
                save()
    save()
    print(json.dumps({"device": results["device"], "copies": {k: round(v, 1) for k, v in results["copies"].items()}}))
    for name, result in results["models"].items():
        cells = result.pop("cells")
        print(name, json.dumps(result))
        for cell, row in cells.items():
            print(
                f"  {cell:32} "
                + "  ".join(f"{key} {value if isinstance(value, str) else f'{value:.3g}'}" for key, value in row.items())
            )


def _pieces(random: RandomModel, cache: Any, copied: dict[str, float], result: dict[str, Any]) -> None:
    """Everything besides cells: kernels against their floors, the step against transformers' own, launches."""
    config = random.model.config
    resident = random.experts(1.0, DeviceOptions(num_whole=0))
    kernels(random, resident, copied["device_copy"], result)
    with torch.no_grad():
        own = transformers.StaticCache(config=config, max_cache_len=LENGTH)
        random.model(random.script[None, :PROMPT], past_key_values=own)
        expected = random.model(random.script[None, PROMPT : PROMPT + 1], past_key_values=own).logits[0, -1].float()
    fused = FusedStep(random.model, resident, cache)
    fused.begin(int(random.script[PROMPT]), PROMPT)
    fused.step()
    result["fused_error"] = float((fused.logits - expected).norm() / expected.norm())
    fused.begin(int(random.script[PROMPT]), PROMPT)
    fused.capture()
    result["launches"] = launches(fused)
    weights = [*random.model.parameters(), *(m.codes for m in random.model.modules() if isinstance(m, ByteLinear))]
    dense_bytes = sum(value.nbytes for value in weights if value.device.type == "cuda")
    dense_bytes -= random.model.model.embed_tokens.weight.nbytes
    token_bytes = dense_bytes + len(random.stacks) * config.num_experts_per_tok * random.layout.length
    result["floor_ms"] = token_bytes / copied["device_copy"] / 1e6
    if native is not None:
        host_answers(random, random.host_compute(), result)


def _measure(
    random: RandomModel,
    arguments: argparse.Namespace,
    began: float,
    copied: dict[str, float],
    result: dict[str, Any],
    save: Callable[[], None],
) -> None:
    cache = transformers.StaticCache(config=random.model.config, max_cache_len=LENGTH)
    whole = random.experts(1.0, DeviceOptions(num_whole=0))
    with torch.no_grad():
        random.model(random.script[None, :PROMPT], past_key_values=cache)  # the state before decoding
    learned: dict[str, Any] = {"eap": activation_paths(random) if "eap" in arguments.methods else None}
    fitted = fit_gates(random) if "fitted" in arguments.methods else None
    result["predicted"] = predicted(random, fitted)
    if fitted is not None:
        learned["fitted"] = better_gates(random, fitted)
        result["fitted_layers"] = sum(weight is not None for weight in learned["fitted"])
    result["copy_us"] = copy_microseconds(random, whole)
    choices = as_array(recorded(random, random.script[: PROMPT + arguments.warm + arguments.measured])[1])
    del whole
    if not arguments.cells_only:
        _pieces(random, cache, copied, result)
        save()
    reference, resident = None, float("nan")
    for share in arguments.shares:
        for method in ["no prefetch"] if share == 1.0 else arguments.methods:
            if time.perf_counter() - began > arguments.seconds:
                result["cut"] = True
                continue
            _empty()
            try:
                row, (tokens, logits) = decode(random, cache, share, method, learned, arguments.warm, arguments.measured)
            except (ValueError, FateError) as error:  # fewer slots than one pass needs, no C++ extension
                result["cells"][f"{share:.2f} {method}"] = {"why_not": str(error)}
                continue
            reference = reference or (tokens, logits)
            row["same_as_resident"] = float(tokens == reference[0] and torch.equal(logits, reference[1]))
            row["logits_error"] = float((logits - reference[1]).norm() / reference[1].norm())
            if share == 1.0:
                resident = row["ms"]
            row["of_resident"] = resident / row["ms"]
            result["cells"][f"{share:.2f} {method}"] = row
            save()
    expected: dict[int, torch.Tensor] = {}
    for tokens, method in itertools.product(arguments.prefill, arguments.prefill_methods):
        for share in (1.0, 0.25) if method == "best" else (0.25,):
            if time.perf_counter() - began < arguments.seconds:
                try:
                    result["cells"][f"{share:.2f} prefill {tokens} {method}"] = prefill(random, share, tokens, method, expected)
                except ValueError as error:  # fewer slots than one pass needs
                    result["cells"][f"{share:.2f} prefill {tokens} {method}"] = {"why_not": str(error)}
                save()
    layers, num_experts, top_k = len(random.stacks), random.stacks[0].num_experts, random.model.config.num_experts_per_tok
    for share in arguments.shares:
        if share < 1 and share * num_experts >= top_k:
            quotas = layer_quotas(round(share * layers * num_experts), layers, num_experts, top_k, 0)
            misses = belady_misses(choices, quotas, num_experts, PROMPT + arguments.warm)
            link = misses * min(result["copy_us"].values()) / 1e3
            result["cells"][f"{share:.2f} bound"] = {
                "misses_per_token": misses, "ready": 1 - misses / layers / top_k, "link_ms": link,
                "of_resident": resident / max(resident, link),
            }  # fmt: skip
    save()


def prefill(random: RandomModel, share: float, tokens: int, method: str, expected: dict[int, torch.Tensor]) -> dict[str, Any]:
    """Time until a prompt of ``tokens`` has been read, through transformers' own layers.

    ``expected`` holds the first logits of each length; all others must have the same numbers.
    """
    _empty()
    experts = random.experts(share, METHODS[method])
    cache = transformers.StaticCache(config=random.model.config, max_cache_len=tokens)

    def read() -> torch.Tensor:
        cache.reset()
        with torch.no_grad():
            logits = random.model(random.script[None, :tokens], past_key_values=cache, logits_to_keep=1).logits
        torch.cuda.synchronize()
        return logits  # type: ignore[no-any-return]

    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = read()
        times.append(time.perf_counter() - start)
    took = min(times[1:])
    same = torch.equal(logits, expected.setdefault(tokens, logits))
    missing = (1 - experts.state.tables.num_slots / random.arena.num_blobs) * random.arena.bytes.numel()
    row = {"tokens_per_second": tokens / took, "ms": took * 1e3, "copy_ms_at_50GBs": missing / 50e6}
    return row | (prompt_parts(read) if share == 1.0 else {}) | {"same_as_others": float(same)}


def _empty() -> None:
    """Give back what cells before this one held."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
