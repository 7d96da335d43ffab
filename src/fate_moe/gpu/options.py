"""How residency on the device behaves."""

from __future__ import annotations

from dataclasses import dataclass

from fate_moe.errors import ConfigError

__all__ = ["DeviceOptions", "device_options"]


@dataclass(frozen=True)
class DeviceOptions:
    """Who gives up a slot and what is fetched ahead.

    eviction: "frequency" (uses, halved every ``half_life`` tokens), "probability" (the same, of what the router gave every expert,
    where the step has it: fused ones) or "recency".
    limit: prefetches per layer, at most; 0 for none (``gpu/regime.py`` says where they only stand in the way).
    num_predicted: that many of the likeliest experts are expected (0: the router's top-k), if their softmax probability is at
    least ``min_probability``.
    num_whole: layers kept whole, from the first on. overlap: compute the resident experts while the missing ones are fetched.
    host_compute: that share of a layer's missing experts (rounded up) is computed on the host instead of copied, in captured steps:
    the host's bandwidth over the sum of both. They round otherwise than on the device, so tokens may differ from fully resident.
    """

    eviction: str = "probability"
    half_life: float = 32.0
    limit: int = 1
    num_predicted: int = 0
    min_probability: float = 0.02
    num_whole: int = 0
    overlap: bool = True
    fetch_programs: int = 16
    host_compute: float = 0.0

    def __post_init__(self) -> None:
        if self.eviction not in ("frequency", "probability", "recency"):
            raise ConfigError(f"eviction {self.eviction!r} is not one of frequency, probability, recency")
        if self.limit < 0 or self.num_predicted < 0 or self.num_whole < 0 or self.half_life <= 0 or self.fetch_programs < 1:
            raise ConfigError(f"{self}: counts must not be negative, half-life and fetch programs must be positive")
        if not 0 <= self.host_compute <= 1:
            raise ConfigError(f"a host share of {self.host_compute} is not between 0 and 1")


def device_options(preset: str) -> DeviceOptions:
    """What ``preset`` (one of config.PRESETS) means on a GPU."""
    return {
        "best": DeviceOptions(),
        "eap": DeviceOptions(eviction="frequency"),  # what comes early: models/path.py
        "fate": DeviceOptions(eviction="recency", num_whole=4, overlap=False),
        "load-on-demand": DeviceOptions(eviction="recency", limit=0, overlap=False),
    }[preset]
