"""Measures the CPU kernels against the memory bandwidth: products of one and a few tokens, fused experts, a layer's prefill.

    python -m benchmarks.kernels [--quick] [--threads N]

Weights are cold: every product reads another matrix of a pool much larger than any cache. The roofline is measured and printed
first; all numbers are medians; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, silu

from benchmarks.facts import memory_bandwidth
from fate_moe.core import BlobLayout
from fate_moe.kernels.cpu import SlotExperts
from fate_moe.kernels.native import native, why_not
from fate_moe.memory.slots import SlotArena
from fate_moe.quant.blob import views
from fate_moe.store.format import blob_layout

# hidden, one expert's inner size, experts a token, experts a layer
SHAPES = {"Qwen1.5-MoE": (2048, 1408, 4, 60), "Qwen3-30B-A3B": (2048, 768, 8, 128), "Mixtral": (4096, 14336, 2, 8)}
EXPERTS: Any = nn.Module()
vars(EXPERTS).update(
    has_gate=True, act_fn=silu, _apply_gate=lambda x: silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]
)
GROUP_SIZE = 64  # the default


def timed(work: Callable[[], Any], seconds: float) -> float:
    """Median seconds of ``work``, repeated for about ``seconds`` after one run to warm up."""
    work()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


def view_bytes(weights: int, planes: int, group_size: int = GROUP_SIZE) -> int:
    """Bytes that a product with ``planes`` planes reads of ``weights`` INT4 weights, scales and zeros included."""
    return weights * (1 + planes) // 8 + weights // group_size * 4


class Pool:
    """INT4 experts of one shape with random codes, ``num_bytes`` in all, in the slots that the runtime uses."""

    def __init__(self, hidden: int, inner: int, num_bytes: int, group_size: int = GROUP_SIZE) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
        self.layout: BlobLayout = blob_layout("int4", self.shapes, "BF16", group_size)
        self.count = max(2, num_bytes // self.layout.length)
        self.arena = SlotArena((self.count, self.layout.length))
        self.buffer = self.arena.buffer
        first = torch.frombuffer(self.buffer, dtype=torch.uint8)[: self.layout.length]
        first.random_(0, 256)
        for name, part in views(self.layout, first).items():
            if name.endswith((".scale", ".zero")):
                part.fill_(0.01 if name.endswith("scale") else 0.075)
        for slot in range(1, self.count):
            self.buffer[slot * self.layout.length : (slot + 1) * self.layout.length] = first.numpy().tobytes()
        self.slots = SlotExperts(self.buffer, self.arena.offsets, [[self.layout] * self.count], [self.shapes])
        self.address = torch.frombuffer(self.buffer, dtype=torch.uint8).data_ptr()


def product(pool: Pool, name: str, tokens: int, planes: int, threads: int, seconds: float) -> float:
    """Seconds of one product with the matrix ``name``, cold."""
    rows, cols = pool.shapes[name]
    place = pool.slots._kernels_of(0, EXPERTS)[0].places[name]  # type: ignore[union-attr]
    x, out = torch.randn(tokens, cols, dtype=torch.bfloat16), torch.empty(tokens, rows)

    def sweep() -> None:
        for slot in range(pool.count):
            at = pool.address + slot * pool.layout.length
            native.linear(place, at, planes, x.data_ptr(), 1, tokens, out.data_ptr(), 0, False, threads)

    return timed(sweep, seconds) / pool.count


def read(pool: Pool, threads: int, seconds: float) -> float:
    """Bytes per second of a loop that only reads the pool."""
    num_bytes = pool.count * pool.layout.length
    return num_bytes / timed(lambda: native.read_memory(pool.address, num_bytes, threads), seconds)


def torch_int4(rows: int, cols: int, tokens: int, num_bytes: int, seconds: float) -> float:
    """Seconds of torch's own int4 product with a cold matrix of the same shape."""
    count = max(2, num_bytes // (rows * cols // 2))
    packed = [torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (rows, cols), dtype=torch.int32), 1) for _ in range(2)]
    weights = [packed[i % 2].clone() for i in range(count)]
    scales = [torch.rand(cols // GROUP_SIZE, rows, 2).bfloat16() for _ in range(count)]
    x = torch.randn(tokens, cols, dtype=torch.bfloat16)

    def sweep() -> None:
        for weight, scale in zip(weights, scales, strict=True):
            torch._weight_int4pack_mm_for_cpu(x, weight, GROUP_SIZE, scale)

    return timed(sweep, seconds) / count


def fused(pool: Pool, experts: int, seconds: float) -> float:
    """Seconds of one token through ``experts`` cold experts in one call."""
    hidden = torch.randn(1, pool.shapes["down_proj"][0], dtype=torch.bfloat16)
    outputs = pool.slots.outputs(0, EXPERTS, hidden, experts)
    rows = {slot: [slot % experts] for slot in range(pool.count)}

    def sweep() -> None:
        for first in range(0, pool.count - experts + 1, experts):
            pool.slots.run(0, EXPERTS, [(slot, slot) for slot in range(first, first + experts)], rows, hidden, outputs)

    return timed(sweep, seconds) / (pool.count // experts)


def prefill(pool: Pool, top_k: int, num_experts: int, tokens: int, seconds: float) -> dict[str, float]:
    """One layer's experts on ``tokens`` tokens, and torch's bf16 GEMM on the same shapes."""
    num_experts = min(num_experts, pool.count)
    hidden = torch.randn(tokens, pool.shapes["down_proj"][0], dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)]).flatten().tolist()
    rows = {expert: [row for row, chosen in enumerate(index) if chosen == expert] for expert in range(num_experts)}
    weights = torch.rand(tokens, top_k).bfloat16()
    ready = sorted(((expert, expert) for expert in rows if rows[expert]), key=lambda item: -len(rows[item[0]]))

    def layer() -> None:
        outputs = pool.slots.outputs(0, EXPERTS, hidden, tokens * top_k)
        pool.slots.run(0, EXPERTS, ready, rows, hidden, outputs)
        pool.slots.combine(outputs, weights, hidden)

    up, down = (torch.randn(shape, dtype=torch.bfloat16) for shape in pool.shapes.values())
    mean = max(1, tokens * top_k // len(ready))
    x, inner = torch.randn(mean, up.shape[1], dtype=torch.bfloat16), torch.randn(mean, down.shape[1], dtype=torch.bfloat16)

    def gemm() -> None:
        for _ in ready:
            linear(x, up)
            linear(inner, down)

    flops = 2.0 * (up.numel() + down.numel())
    ours, theirs = timed(layer, seconds), timed(gemm, seconds)
    return {
        "prefill_gflops": flops * tokens * top_k / ours / 1e9,
        "prefill_torch_bf16_gflops": flops * mean * len(ready) / theirs / 1e9,
        "prefill_vs_torch_bf16": (tokens * top_k / ours) / (mean * len(ready) / theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 40 s: smaller pools, shorter measurements")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    if (reason := why_not()) is not None:
        parser.error(reason)
    threads, seconds = arguments.threads, 0.4 if arguments.quick else 3.0
    torch.set_num_threads(threads)
    pool_bytes = (1 if arguments.quick else 2) << 30
    print(f"{native.instruction_set()}, {threads} threads ({native.team()})")
    results: dict[str, Any] = {"instruction_set": native.instruction_set(), "threads": threads}
    for name, (hidden, inner, top_k, num_experts) in SHAPES.items():
        weights = 2 * inner * hidden
        pool = Pool(hidden, inner, pool_bytes)
        memory = max(read(pool, threads, seconds), memory_bandwidth(threads, pool_bytes // 2))
        floor = view_bytes(weights, 3) / memory * 1e6
        print(f"\n{name}: gate_up [{2 * inner}, {hidden}], down [{hidden}, {inner}]")
        print(f"memory read {memory / 1e9:.1f} GB/s: gate_up at INT4 takes at least {floor:.0f} us")
        shape: dict[str, float] = {"memory_gbps": memory / 1e9}
        for planes, view in ((3, "int4"), (2, "view3"), (1, "view2")):
            taken = product(pool, "gate_up_proj", 1, planes, threads, seconds)
            shape[f"{view}_m1_us"] = taken * 1e6
            shape[f"{view}_m1_gbps"] = view_bytes(weights, planes) / taken / 1e9
        shape["int4_down_m1_gbps"] = view_bytes(weights // 2, 3) / product(pool, "down_proj", 1, 3, threads, seconds) / 1e9
        for tokens in (2, 4, 8):
            shape[f"int4_m{tokens}_us"] = product(pool, "gate_up_proj", tokens, 3, threads, seconds) * 1e6
        for experts in (4, 8):
            if experts > min(num_experts, pool.count):
                continue
            taken = fused(pool, experts, seconds)
            shape[f"fused_{experts}_us"] = taken * 1e6
            shape[f"fused_{experts}_gbps"] = experts * 1.5 * view_bytes(weights, 3) / taken / 1e9
        if name == "Qwen1.5-MoE":
            shape |= prefill(pool, top_k, num_experts, 512, 2 * seconds)
        memory = max(memory, read(pool, threads, seconds))  # the better of before and after, since other load on the host varies
        shape["memory_gbps"] = memory / 1e9
        del pool
        if name == "Qwen1.5-MoE":
            for size in (32, 128):
                pool = Pool(hidden, inner, pool_bytes, size)
                taken = product(pool, "gate_up_proj", 1, 3, threads, seconds)
                shape[f"int4_groups{size}_m1_us"] = taken * 1e6
                shape[f"int4_groups{size}_m1_gbps"] = view_bytes(weights, 3, size) / taken / 1e9
                layer = prefill(pool, top_k, num_experts, 512, 2 * seconds)
                shape[f"int4_groups{size}_prefill_gflops"] = layer["prefill_gflops"]
                del pool
        theirs = torch_int4(2 * inner, hidden, 1, pool_bytes // 2, seconds)
        shape["torch_int4_m1_us"] = theirs * 1e6
        shape["int4_m1_vs_torch"] = theirs * 1e6 / shape["int4_m1_us"]
        shape["int4_m1_share_of_memory_bandwidth"] = shape["int4_m1_gbps"] / shape["memory_gbps"]
        shape["view3_time_vs_int4"] = shape["view3_m1_us"] / shape["int4_m1_us"]
        shape["view2_time_vs_int4"] = shape["view2_m1_us"] / shape["int4_m1_us"]
        for key, value in shape.items():
            print(f"  {key:36} {value:10.2f}")
        results[name] = shape
    print(json.dumps({**results, **results["Qwen1.5-MoE"]}))


if __name__ == "__main__":
    main()
