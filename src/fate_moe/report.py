"""What a run did: in words for people, in a dict for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fate_moe.config import OffloadConfig, format_bytes
from fate_moe.core import Counters
from fate_moe.machine import peak_memory
from fate_moe.planner import Plan

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Counters of the experts' traffic, and memory. ``print(report)`` reads as a short paragraph."""

    experts: Counters
    budget_bytes: int
    peak_bytes: int
    policy: str
    predictor: str
    precision: str
    expert_cache_bytes: int

    @classmethod
    def of(cls, counters: Counters, plan: Plan, config: OffloadConfig) -> Report:
        return cls(
            counters,
            plan.budget_bytes,
            peak_memory(),
            config.policy_name,
            config.predictor_name,
            plan.precision,
            plan.expert_cache_bytes,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "experts": self.experts.as_dict(),
            "memory": {"budget_bytes": self.budget_bytes, "peak_bytes": self.peak_bytes},
            "config": {
                "policy": self.policy,
                "predictor": self.predictor,
                "precision": self.precision,
                "expert_cache_bytes": self.expert_cache_bytes,
            },
        }

    def __str__(self) -> str:
        experts = self.experts
        used = (
            f", {experts.prefetch_used / experts.prefetched:.0%} of {experts.prefetched} prefetched ones used"
            if experts.prefetched
            else ""
        )
        return (
            f"experts: {experts.ready_on_time:.1%} of {experts.lookups} ready on time, {experts.in_flight} in flight, "
            f"{experts.misses} missed{used}\n"
            f"read from disk: {format_bytes(experts.bytes_read)}, {experts.stall_seconds:.2f} s waited for it\n"
            f"memory: peak {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)} budget, "
            f"{format_bytes(self.expert_cache_bytes)} of it expert slots ({self.policy}, {self.predictor}, {self.precision})"
        )
