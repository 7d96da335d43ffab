"""Measures the CPU kernels against the memory bandwidth: products of one to 16 tokens, fused experts, a layer's prompt.

    python -m benchmarks.kernels [--quick] [--threads N] [--kernels NAME ...] [--shapes NAME ...] [--json FILE]

Weights are cold: every product reads another matrix of a pool much larger than any cache. The bandwidth is that of a loop which
reads the pool. Everything of a shape is measured in turns, each of which runs every case once; all numbers are medians, so that
ratios compare what ran side by side. torch's GEMM has the instructions that torch chooses: `ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2` holds it to AVX2.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, silu

from benchmarks.facts import processor_facts
from fate_moe import switches
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
VIEWS = {"int4": 3, "view3": 2, "view2": 1}  # planes
TOKENS = (2, 4, 8, 16)
PROMPT = 512

Case = tuple[Callable[[], Any], int]  # what is timed, and how many products or calls that is


def in_turns(cases: dict[str, Case], turns: int) -> dict[str, float]:
    """Median seconds of one product or call of each case: in each turn all of them run once, after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, (work, count) in cases.items():
            began = time.perf_counter()
            work()
            if turn:
                taken[name].append((time.perf_counter() - began) / count)
    return {name: median(seconds) for name, seconds in taken.items()}


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


def product(pool: Pool, kernels: str, name: str, tokens: int, planes: int, threads: int) -> Case:
    """Products with the matrix ``name`` of every expert of the pool, by the instruction set ``kernels``."""
    rows, cols = pool.shapes[name]
    place = pool.slots._kernels_of(0, EXPERTS)[0].places[name]  # type: ignore[union-attr]
    x, out = torch.randn(tokens, cols, dtype=torch.bfloat16), torch.empty(tokens, rows)

    def sweep() -> None:
        native.choose(kernels)
        for slot in range(pool.count):
            at = pool.address + slot * pool.layout.length
            native.linear(place, at, planes, x.data_ptr(), 1, tokens, out.data_ptr(), 0, False, threads)

    return sweep, pool.count


def torch_int4(rows: int, cols: int, num_bytes: int) -> Case:
    """torch's own int4 product of one token with cold matrices of the same shape."""
    count = max(2, num_bytes // (rows * cols // 2))
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (rows, cols), dtype=torch.int32), 1)
    weights = [packed.clone() for _ in range(count)]
    scales = [torch.rand(cols // GROUP_SIZE, rows, 2).bfloat16() for _ in range(count)]
    x = torch.randn(1, cols, dtype=torch.bfloat16)

    def sweep() -> None:
        for weight, scale in zip(weights, scales, strict=True):
            torch._weight_int4pack_mm_for_cpu(x, weight, GROUP_SIZE, scale)

    return sweep, count


def fused(pool: Pool, kernels: str, experts: int) -> Case:
    """One token through ``experts`` cold experts in one call."""
    hidden = torch.randn(1, pool.shapes["down_proj"][0], dtype=torch.bfloat16)
    outputs = pool.slots.outputs(0, EXPERTS, hidden, experts)
    rows = {slot: [slot % experts] for slot in range(pool.count)}

    def sweep() -> None:
        native.choose(kernels)
        for first in range(0, pool.count - experts + 1, experts):
            pool.slots.run(0, EXPERTS, [(slot, slot) for slot in range(first, first + experts)], rows, hidden, outputs)

    return sweep, pool.count // experts


def prompts(pool: Pool, sets: list[str], top_k: int, num_experts: int) -> tuple[dict[str, Case], dict[str, float]]:
    """One layer's experts on a prompt by each instruction set, torch's bf16 GEMM of as many tokens an expert; the operations."""
    num_experts = min(num_experts, pool.count)
    top_k = min(top_k, num_experts)
    hidden = torch.randn(PROMPT, pool.shapes["down_proj"][0], dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(PROMPT)]).flatten().tolist()
    rows = {expert: [row for row, chosen in enumerate(index) if chosen == expert] for expert in range(num_experts)}
    weights = torch.rand(PROMPT, top_k).bfloat16()
    ready = sorted(((expert, expert) for expert in rows if rows[expert]), key=lambda item: -len(rows[item[0]]))

    def layer(kernels: str) -> None:
        native.choose(kernels)
        outputs = pool.slots.outputs(0, EXPERTS, hidden, PROMPT * top_k)
        pool.slots.run(0, EXPERTS, ready, rows, hidden, outputs)
        pool.slots.combine(outputs, weights, hidden)

    up, down = (torch.randn(shape, dtype=torch.bfloat16) for shape in pool.shapes.values())
    mean = max(1, PROMPT * top_k // len(ready))
    x, inner = torch.randn(mean, up.shape[1], dtype=torch.bfloat16), torch.randn(mean, down.shape[1], dtype=torch.bfloat16)

    def gemm() -> None:
        for _ in ready:
            linear(x, up)
            linear(inner, down)

    of_token = 2.0 * (up.numel() + down.numel())
    cases: dict[str, Case] = {f"{name} prompt": (partial(layer, name), 1) for name in sets}
    operations = dict.fromkeys(cases, of_token * PROMPT * top_k)
    return cases | {"torch bf16 prompt": (gemm, 1)}, operations | {"torch bf16 prompt": of_token * mean * len(ready)}


def measure(name: str, sets: list[str], group: int, pool_bytes: int, threads: int, turns: int) -> dict[str, Any]:
    """The numbers of one shape and group size: of the memory, of each instruction set, of torch."""
    hidden, inner, top_k, num_experts = SHAPES[name]
    pool = Pool(hidden, inner, pool_bytes, group)
    num_bytes, weights, usual = pool.count * pool.layout.length, 2 * inner * hidden, group == GROUP_SIZE
    cases: dict[str, Case] = {"read": (lambda: native.read_memory(pool.address, num_bytes, threads), 1)}
    for kernels in sets:
        for view, planes in VIEWS.items():
            cases[f"{kernels} {view}"] = product(pool, kernels, "gate_up_proj", 1, planes, threads)
        if usual:
            cases[f"{kernels} down"] = product(pool, kernels, "down_proj", 1, 3, threads)
            cases |= {f"{kernels} m{tokens}": product(pool, kernels, "gate_up_proj", tokens, 3, threads) for tokens in TOKENS}
            cases |= {
                f"{kernels} fused{count}": fused(pool, kernels, count) for count in (4, 8) if count <= min(num_experts, pool.count)
            }
    if usual:
        cases["torch int4"] = torch_int4(2 * inner, hidden, pool_bytes // 2)
    of_prompt, operations = prompts(pool, sets, top_k, num_experts)
    seconds = in_turns(cases, turns) | in_turns(of_prompt, turns)
    memory = num_bytes / seconds["read"]
    found: dict[str, Any] = {"memory_gbps": memory / 1e9, "int4_floor_us": view_bytes(weights, 3, group) / memory * 1e6}
    if usual:
        found["torch_int4_m1_us"] = seconds["torch int4"] * 1e6
    found["torch_bf16_prompt_gflops"] = operations["torch bf16 prompt"] / seconds["torch bf16 prompt"] / 1e9
    for kernels in sets:
        one = seconds[f"{kernels} int4"]
        of = {f"{view}_m1_us": seconds[f"{kernels} {view}"] * 1e6 for view in VIEWS}
        of |= {
            f"{view}_m1_gbps": view_bytes(weights, planes, group) / seconds[f"{kernels} {view}"] / 1e9
            for view, planes in VIEWS.items()
        }
        of["int4_m1_share_of_memory_bandwidth"] = of["int4_m1_gbps"] * 1e9 / memory
        of |= {f"{view}_time_vs_int4": seconds[f"{kernels} {view}"] / one for view in ("view3", "view2")}
        if usual:
            of["int4_m1_vs_torch"] = seconds["torch int4"] / one
            of["int4_down_m1_gbps"] = view_bytes(weights // 2, 3) / seconds[f"{kernels} down"] / 1e9
            of |= {f"int4_m{tokens}_time_vs_m1": seconds[f"{kernels} m{tokens}"] / one for tokens in TOKENS}
            for count in (4, 8):
                if taken := seconds.get(f"{kernels} fused{count}"):
                    of[f"fused_{count}_gbps"] = count * 1.5 * view_bytes(weights, 3) / taken / 1e9
        of["prompt_gflops"] = operations[f"{kernels} prompt"] / seconds[f"{kernels} prompt"] / 1e9
        of["prompt_vs_torch_bf16"] = of["prompt_gflops"] / found["torch_bf16_prompt_gflops"]
        found[kernels] = of
    return found


def table(name: str, sets: list[str], found: dict[str, Any]) -> str:
    """The numbers of one shape, an instruction set a column."""
    shared = ", ".join(f"{key} {value:.1f}" for key, value in found.items() if key not in sets)
    lines = [f"\n{name}: {shared}", f"  {'':36}" + "".join(f"{kernels:>13}" for kernels in sets)]
    for key in found[sets[0]]:
        lines.append(f"  {key:36}" + "".join(f"{found[kernels][key]:13.2f}" for kernels in sets))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller pools, fewer turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: %(default)s")
    parser.add_argument("--kernels", nargs="+", choices=list(switches.KERNELS), metavar="NAME", help="default: all but portable")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    arguments = parser.parse_args()
    if (reason := why_not()) is not None:
        parser.error(reason)
    available = native.instruction_sets()
    wanted = [switches.KERNELS[name] for name in arguments.kernels or () if switches.KERNELS[name] in available]
    sets = wanted or [name for name in available if name != "portable"] or available
    torch.set_num_threads(arguments.threads)
    facts = {
        **processor_facts(),
        "threads": arguments.threads,
        "team": native.team(),
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "switches": switches.library_settings(),
    }
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    turns, pool_bytes = (3, 256 << 20) if arguments.quick else (15, 1 << 30)
    results: dict[str, Any] = {"machine": facts}
    for name in arguments.shapes:
        for group in (GROUP_SIZE, 32, 128) if name == "Qwen1.5-MoE" else (GROUP_SIZE,):
            title = name if group == GROUP_SIZE else f"{name}, groups of {group}"
            results[title] = measure(name, sets, group, pool_bytes, arguments.threads, turns)
            print(table(title, sets, results[title]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
