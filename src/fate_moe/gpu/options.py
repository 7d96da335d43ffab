"""How residency on a GPU behaves. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from fate_moe.errors import ConfigError

__all__ = ["DeviceOptions"]


@dataclass(frozen=True)
class DeviceOptions:
    """Who gives up a slot and what is fetched ahead.

    eviction: "frequency" (uses, halved every ``half_life`` tokens), "probability" (the same, of what the router gave every expert,
    where the step has it: fused ones with a softmax router) or "recency".
    limit: prefetches per layer, at most; 0 for none (``gpu/prefetch_trial.py`` finds out where they do not pay).
    num_predicted: that many of the likeliest experts are expected (0: the router's top-k), if their softmax probability is at
    least ``min_probability``.
    num_whole: layers kept whole, from the first on. overlap: compute the resident experts while the missing ones are fetched.
    activation_path: fetch what followed the same path of experts before (layers/cuda_path_step.py), not what the next router says.
    host_compute: that fraction of a layer's missing experts (rounded up) is computed on the host instead of copied, in fused
    steps; None: as many as a measurement says (``gpu/host_trial.py``).
    admit_every: one layer of so many copies one of the experts that the host computed behind the step, so that what is resident
    follows the routing; 0: none (``gpu/prefetch_trial.py`` finds out how many the link has time for).
    """

    eviction: str = "probability"
    half_life: float = 32.0
    limit: int = 1
    num_predicted: int = 0
    min_probability: float = 0.02
    num_whole: int = 0
    overlap: bool = True
    activation_path: bool = False
    fetch_programs: int = 16
    host_compute: float | None = 0.0
    admit_every: int = 0

    def __post_init__(self) -> None:
        if self.eviction not in ("frequency", "probability", "recency"):
            raise ConfigError(f"eviction {self.eviction!r} is not one of frequency, probability, recency")
        counts = self.limit, self.num_predicted, self.num_whole, self.admit_every
        if min(counts) < 0 or self.half_life <= 0 or self.fetch_programs < 1:
            raise ConfigError(f"{self}: counts must not be negative, half-life and fetch programs must be positive")
        if self.host_compute is not None and not 0 <= self.host_compute <= 1:
            raise ConfigError(f"host_compute {self.host_compute} is not between 0 and 1")

    def hosted(self, most: int) -> list[int]:
        """For 0 to ``most`` misses of a layer, how many the host computes; none before they are measured."""
        return [misses - int(misses * (1 - (self.host_compute or 0.0))) for misses in range(most + 1)]
