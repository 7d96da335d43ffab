"""What fits where on a machine with a GPU: two budgets, decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fate_moe.config import OffloadConfig
from fate_moe.core import KV_BLOCK
from fate_moe.engine.budget import AUTO_FRACTION, SPREAD_BYTES, Footprint, prefix_bytes
from fate_moe.errors import BudgetError
from fate_moe.gpu.device import CONTEXT_BYTES, Gpu
from fate_moe.gpu.options import DeviceOptions
from fate_moe.machine import available_memory, resident_memory
from fate_moe.units import format_bytes, parse_amount, parse_host_compute

__all__ = ["DevicePlan", "make_device_plan", "min_slots"]

# Besides what the table lists: cuBLAS' workspace (32 MiB), the recorded graph, what the allocator rounds up.
VRAM_RESERVE_BYTES = 256 << 20
# What a process with a GPU grows by between planning and its peak: libraries that are loaded when first used, Triton's compiler.
# Measured 840 MiB, and 1 GiB to 1.2 GiB when kernels have to be compiled first (torch 2.11, CUDA 13).
RAM_RESERVE_BYTES = 1280 << 20
# Of what is free on the GPU. The rest is left to a desktop.
AUTO_VRAM_FRACTION = 0.9
# Experts of a layer that prefill streams at once, at most; half of them are computed while the other half is copied.
MAX_STAGING = 64


@dataclass(frozen=True)
class DevicePlan:
    """Where both budgets go; amounts in bytes. ``vram_*``, weights, KV cache, activations and slots are on the GPU;
    ``budget_bytes``, ``runtime_bytes``, ``passing_bytes`` and host slots are RAM.

    ``passing_bytes``: dense weights on their way to the GPU, given back before the host slots are filled. ``host_compute``: of the
    experts missing in VRAM, how many the CPU computes (None: as many as is measured while loading). ``prefix_cache_bytes`` of
    the KV cache may hold beginnings of texts that ended. ``unread``: tensors of the checkpoint that the model does not use, and
    why.
    """

    family: str
    precision: str
    gpu: str
    context_length: int
    num_experts: int
    slot_bytes: int
    vram_budget_bytes: int
    vram_runtime_bytes: int
    dense_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    num_staging: int
    num_slots: int
    budget_bytes: int
    runtime_bytes: int
    passing_bytes: int
    num_host_slots: int
    host_compute: float | None
    prefix_cache_bytes: int = 0
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def expert_cache_bytes(self) -> int:
        """The slots in VRAM."""
        return self.num_slots * self.slot_bytes

    @property
    def host_cache_bytes(self) -> int:
        """The slots in RAM."""
        return self.num_host_slots * self.slot_bytes

    @property
    def reads_disk(self) -> bool:
        """Whether RAM cannot hold all experts, so that the disk stays below it."""
        return self.num_host_slots < self.num_experts

    @property
    def vram_left_bytes(self) -> int:
        fixed = self.vram_runtime_bytes + self.dense_bytes + self.kv_cache_bytes + self.activation_bytes
        return self.vram_budget_bytes - fixed - (self.num_slots + self.num_staging) * self.slot_bytes

    @property
    def left_bytes(self) -> int:
        """Of RAM."""
        return self.budget_bytes - self.runtime_bytes - max(self.passing_bytes, self.host_cache_bytes)

    @property
    def computed(self) -> str:
        """What the CPU computes, in words; empty if nothing."""
        if self.host_compute == 0 or self.num_slots == self.num_experts:
            return ""
        share = (
            "those of them that it has sooner than the link" if self.host_compute is None else f"{self.host_compute:.0%} of them"
        )
        return f"of experts missing in VRAM the CPU computes {share}"

    def as_dict(self) -> dict[str, Any]:
        names = ("expert_cache_bytes", "host_cache_bytes", "reads_disk", "vram_left_bytes", "left_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) for a table."""
        below = "the disk is read for the others" if self.reads_disk else "the disk is not read after loading"
        below += f"; {self.computed}" if self.computed else ""
        return [
            ("VRAM: CUDA, kernels, graph", self.vram_runtime_bytes, self.gpu),
            ("VRAM: dense weights", self.dense_bytes, "attention, norms, routers, shared experts, embeddings"),
            ("VRAM: KV cache", self.kv_cache_bytes, f"{self.context_length} tokens"),
            ("VRAM: activations", self.activation_bytes, f"prefill of {self.context_length} tokens"),
            ("VRAM: staging", self.num_staging * self.slot_bytes, f"{self.num_staging} experts on their way through prefill"),
            ("VRAM: expert slots", self.expert_cache_bytes, f"{self._fraction_of(self.num_slots)}, {self.precision}"),
            ("VRAM: left", self.vram_left_bytes, ""),
            ("VRAM budget", self.vram_budget_bytes, "of the GPU, this process"),
            ("RAM: Python, torch, CUDA", self.runtime_bytes, "measured in this process"),
            ("RAM: pinned expert slots", self.host_cache_bytes, f"{self._fraction_of(self.num_host_slots)}; {below}"),
            ("RAM: dense weights in passing", max(0, self.passing_bytes - self.host_cache_bytes), "beyond the pinned slots"),
            ("RAM: left", self.left_bytes, ""),
            ("RAM budget", self.budget_bytes, "the whole process; beside it the page cache may hold the store"),
        ]

    def line(self) -> str:
        """The plan in one line."""
        return (
            f"{self.family}, {self.precision}: VRAM {format_bytes(self.vram_budget_bytes)} = "
            f"CUDA {format_bytes(self.vram_runtime_bytes)} + dense {format_bytes(self.dense_bytes)} + "
            f"KV {format_bytes(self.kv_cache_bytes)} + activations {format_bytes(self.activation_bytes)} + "
            f"staging {format_bytes(self.num_staging * self.slot_bytes)} + "
            f"{self.num_slots}/{self.num_experts} expert slots {format_bytes(self.expert_cache_bytes)} + "
            f"left {format_bytes(self.vram_left_bytes)}; RAM {format_bytes(self.budget_bytes)} = "
            f"runtime {format_bytes(self.runtime_bytes)} + {self.num_host_slots}/{self.num_experts} pinned slots "
            f"{format_bytes(self.host_cache_bytes)} + left {format_bytes(self.left_bytes)}"
            f"{f'; {self.computed}' if self.computed else ''}"
        )

    def _fraction_of(self, slots: int) -> str:
        return f"{slots} of {self.num_experts} experts ({slots / self.num_experts:.1%})"


def min_slots(needs: Footprint, options: DeviceOptions) -> int:
    """The fewest slots in VRAM: each layer has its own, for one token's experts and what is fetched ahead."""
    return needs.num_layers * min(needs.num_experts // needs.num_layers, needs.min_slots + options.limit)


def make_device_plan(needs: Footprint, config: OffloadConfig, gpu: Gpu, options: DeviceOptions) -> DevicePlan:
    """Divide both budgets. Call it after torch, transformers and the GPU are in use: what they take in RAM is measured.

    Raises BudgetError, naming the smallest budget that works, for the tier that is too small.
    """
    slot, fewest_slots = needs.slot_bytes, min_slots(needs, options)
    vram = (
        int(gpu.free_bytes * AUTO_VRAM_FRACTION)
        if config.vram in (None, "auto")
        else parse_amount(config.vram or 0, gpu.free_bytes)
    )
    runtime = (CONTEXT_BYTES if gpu.device.type == "cuda" else 0) + VRAM_RESERVE_BYTES
    kv = needs.kv_bytes_per_token * -(-config.context_length // KV_BLOCK) * KV_BLOCK  # in whole blocks
    # Beyond what the CPU needs: attention's mask, as a bool and as numbers, and the experts' inner vectors by (token, choice).
    activations = (
        needs.activation_bytes_per_token + needs.inner_bytes_per_token + 3 * config.context_length
    ) * config.context_length
    fixed = runtime + needs.device_bytes + kv + activations
    if vram > gpu.free_bytes:
        raise BudgetError(
            f"--vram {config.vram} is more than the {format_bytes(gpu.free_bytes)} that are free on {gpu.name}; give less, or end "
            "what else runs there",
            fixed + (fewest_slots + 2) * slot,
        )
    room = (vram - fixed) // slot
    if room < fewest_slots + 2:
        works = fixed + (fewest_slots + 2) * slot + SPREAD_BYTES
        raise BudgetError(
            f"{format_bytes(vram)} of VRAM are too few: {format_bytes(runtime)} CUDA, {format_bytes(needs.device_bytes)} dense "
            f"weights, {format_bytes(kv + activations)} for {config.context_length} tokens and {fewest_slots + 2} expert slots of "
            f"{format_bytes(slot)} need at least --vram {-(-works >> 20)}MiB (or a shorter --context-length)",
            works,
        )
    staging = max(2, min(MAX_STAGING, 2 * (needs.num_experts // needs.num_layers), room // 8, room - fewest_slots) // 2 * 2)
    num_slots = min(needs.num_experts, room - staging)
    if config.expert_cache is not None:
        wanted = parse_amount(config.expert_cache, needs.num_experts * slot) // slot
        if not fewest_slots <= wanted <= room - 2:
            raise BudgetError(
                f"--expert-cache {config.expert_cache} is {wanted} experts; the GPU needs at least {fewest_slots} "
                f"({format_bytes(fewest_slots * slot)}) and --vram leaves room for {room - 2}",
                fixed + (max(fewest_slots, wanted) + 2) * slot,
            )
        num_slots, staging = min(needs.num_experts, wanted), min(staging, (room - min(needs.num_experts, wanted)) // 2 * 2)
    fraction = parse_host_compute(config.host_compute)
    ram, process, num_host = _ram(needs, config)
    if fraction != 0 and num_host < needs.num_experts:
        if fraction is not None:
            works = process + needs.num_experts * slot + SPREAD_BYTES
            raise BudgetError(
                f"--host-compute {config.host_compute} needs every expert in RAM, and {format_bytes(ram)} hold {num_host} of "
                f"{needs.num_experts}; give --ram {-(-works >> 20)}MiB, or omit --host-compute",
                works,
            )
        fraction = 0.0  # "auto" takes what there is
    return DevicePlan(
        family=needs.family,
        precision=needs.precision,
        gpu=gpu.name,
        context_length=config.context_length,
        num_experts=needs.num_experts,
        slot_bytes=slot,
        vram_budget_bytes=vram,
        vram_runtime_bytes=runtime,
        dense_bytes=needs.device_bytes,
        kv_cache_bytes=kv,
        prefix_cache_bytes=prefix_bytes(config, kv),
        activation_bytes=activations,
        num_staging=staging,
        num_slots=num_slots,
        budget_bytes=ram,
        runtime_bytes=process,
        passing_bytes=needs.dense_bytes + needs.row_bytes,
        num_host_slots=num_host,
        host_compute=fraction,
    )


def _ram(needs: Footprint, config: OffloadConfig) -> tuple[int, int, int]:
    """(budget, what the process takes, host slots)."""
    free = available_memory() + resident_memory()
    ram = int(free * AUTO_FRACTION) if config.ram == "auto" else parse_amount(config.ram, free)
    process = resident_memory() + RAM_RESERVE_BYTES
    passing = needs.dense_bytes + needs.row_bytes
    fewest_slots = needs.min_slots + 2  # one token's experts, and some that come meanwhile
    smallest = process + max(passing, min(needs.num_experts, fewest_slots) * needs.slot_bytes)
    if smallest > ram:
        works = smallest + SPREAD_BYTES
        raise BudgetError(
            f"{format_bytes(ram)} of RAM are too few: {format_bytes(process)} process, and {format_bytes(passing)} "
            f"dense weights in passing or {fewest_slots} experts of {format_bytes(needs.slot_bytes)}, need at least --ram "
            f"{-(-works >> 20)}MiB",
            works,
        )
    return ram, process, min(needs.num_experts, (ram - process) // needs.slot_bytes)
