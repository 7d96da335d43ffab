"""What a run did: in words for people, in a dict for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fate_moe.core import Counters, Drafts
from fate_moe.units import format_bytes

__all__ = ["PrefixReport", "Report"]


@dataclass(frozen=True)
class PrefixReport:
    """What prefixes of earlier texts were good for: ``cached_tokens`` of ``prompt_tokens`` did not have to be read, which saved
    ``saved_seconds`` at the speed of those that were. ``kept_bytes`` are kept in RAM now and ``disk_bytes``, of all models, on the
    disk (when this process last wrote there); ``disk_read_bytes`` and ``disk_written_bytes`` are of this process."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    kept_bytes: int = 0
    disk_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    saved_seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"prefixes: {self.cached_tokens / max(1, self.prompt_tokens):.0%} of {self.prompt_tokens} prompt tokens were there, "
            f"{self.saved_seconds:.1f} s saved; {format_bytes(self.kept_bytes)} kept, {format_bytes(self.disk_read_bytes)} read "
            f"from disk, {format_bytes(self.disk_written_bytes)} written"
        )


@dataclass(frozen=True)
class Report:
    """Counters of the experts' traffic, and memory. ``print(report)`` reads as a short paragraph.

    On a GPU ``experts`` counts lookups in VRAM and bytes from RAM, ``disk`` what RAM had to read, where it cannot hold all.
    ``prefixes``: where a scheduler keeps some.
    """

    experts: Counters
    budget_bytes: int
    peak_bytes: int
    policy: str
    predictor: str
    precision: str
    expert_cache_bytes: int
    precision_policy: str
    uses_by_bits: dict[int, int] = field(default_factory=dict)
    vram_budget_bytes: int = 0
    vram_peak_bytes: int = 0
    disk: Counters | None = None
    host_compute: float = 0.0
    num_hosted: int = 0
    prefixes: PrefixReport | None = None
    drafts: Drafts = field(default_factory=Drafts)

    def traffic(self, num_tokens: int) -> str:
        """Bytes moved per token, for people."""
        return (
            f"{format_bytes(self.experts.bytes_read / num_tokens)} {'to VRAM' if self.vram_budget_bytes else 'from disk'} per token"
        )

    def as_dict(self) -> dict[str, Any]:
        memory = {"budget_bytes": self.budget_bytes, "peak_bytes": self.peak_bytes}
        if self.vram_budget_bytes:
            memory |= {"vram_budget_bytes": self.vram_budget_bytes, "vram_peak_bytes": self.vram_peak_bytes}
        return {
            "experts": {
                **self.experts.as_dict(),
                "uses_by_bits": self.uses_by_bits,
                **({"hosted": self.num_hosted} if self.vram_budget_bytes else {}),
            },
            **({"disk": self.disk.as_dict()} if self.disk is not None else {}),
            **({"prefixes": asdict(self.prefixes)} if self.prefixes is not None else {}),
            "drafts": {
                "drafted": self.drafts.drafted,
                "accepted": self.drafts.accepted,
                "by_source": {
                    source: {"drafted": drafted, "accepted": accepted}
                    for source, (drafted, accepted) in self.drafts.by_source.items()
                },
            },
            "memory": memory,
            "config": {
                "policy": self.policy,
                "predictor": self.predictor,
                "precision": self.precision,
                "precision_policy": self.precision_policy,
                "expert_cache_bytes": self.expert_cache_bytes,
                **({"host_compute": self.host_compute} if self.vram_budget_bytes else {}),
            },
        }

    def __str__(self) -> str:
        experts = self.experts
        used = (
            f", {experts.prefetch_used / experts.prefetched:.0%} of {experts.prefetched} prefetched ones used"
            if experts.prefetched
            else ""
        )
        if self.vram_budget_bytes:
            return self._device_paragraph(used)
        uses = max(1, sum(self.uses_by_bits.values()))
        bits = ", ".join(f"{count / uses:.1%} of uses with {bits} bits" for bits, count in self.uses_by_bits.items())
        by_policy = f"{self.precision_policy}: {bits}, {experts.upgrades} upgrades\n" if self.precision_policy != "full" else ""
        prefixes = f"{self.prefixes}\n" if self.prefixes is not None and self.prefixes.prompt_tokens else ""
        sources = ", ".join(f"{source} {kept} of {drafted}" for source, (drafted, kept) in self.drafts.by_source.items())
        drafts = (
            f"speculation: {self.drafts.accepted} of {self.drafts.drafted} drafted tokens kept ({sources})\n"
            if self.drafts.drafted
            else ""
        )
        return (
            f"experts: {experts.ready_on_time:.1%} of {experts.lookups} ready on time, {experts.in_flight} in flight, "
            f"{experts.misses} missed{used}\n"
            f"read from disk: {format_bytes(experts.bytes_read)}, {experts.stall_seconds:.2f} s waited for it\n"
            f"{by_policy}{prefixes}{drafts}"
            f"memory: peak {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)} budget, "
            f"{format_bytes(self.expert_cache_bytes)} of it expert slots ({self.policy}, {self.predictor}, {self.precision})"
        )

    def _device_paragraph(self, used: str) -> str:
        experts, disk = self.experts, self.disk
        below = (
            f"RAM had {disk.ready_on_time:.1%} of what was copied, {format_bytes(disk.bytes_read)} read from disk ({self.policy})\n"
            if disk is not None
            else ""
        )
        computed = f", {self.num_hosted} of them computed by the CPU" if self.host_compute else ""
        return (
            f"experts: {experts.ready_on_time:.1%} of {experts.lookups} in VRAM on time, {experts.misses} missed{computed}{used}; "
            f"{format_bytes(experts.bytes_read)} copied in decode\n"
            f"{below}"
            f"memory: VRAM peak {format_bytes(self.vram_peak_bytes)} of {format_bytes(self.vram_budget_bytes)}, "
            f"{format_bytes(self.expert_cache_bytes)} of it expert slots; RAM peak {format_bytes(self.peak_bytes)} of "
            f"{format_bytes(self.budget_bytes)} ({self.predictor}, {self.precision})"
        )
