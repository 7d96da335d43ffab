"""Options and sizes. No torch: ``fate --help`` reads its defaults from here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fate_moe.core import PRECISIONS
from fate_moe.errors import ConfigError

__all__ = [
    "DEVICES",
    "GROUP_SIZES",
    "POLICIES",
    "PRECISION_POLICIES",
    "PREDICTORS",
    "PRESETS",
    "SOLVERS",
    "OffloadConfig",
    "cache_home",
    "format_bytes",
    "parse_amount",
    "parse_host_compute",
    "parse_size",
]

DEVICES = ("cpu", "cuda")
POLICIES = ("arc", "co-activation", "decayed", "least-stale", "lfu", "lru", "shallow-arc")
PREDICTORS = (
    "activation-path",
    "combined",
    "cross-layer",
    "cross-layer-probability",
    "cross-layer-norm",
    "forecast",
    "learned",
    "none",
    "recursive",
    "temporal",
)
# What published systems do, and what does best here (docs/prediction.md): (policy, predictor).
PRESETS = {
    "best": ("co-activation", "combined"),
    "eap": ("lfu", "activation-path"),
    "fate": ("shallow-arc", "cross-layer"),
    "load-on-demand": ("lru", "none"),
}
# How much of a missing expert is read; only "full" keeps every number.
PRECISION_POLICIES = ("full", "prefill-popularity", "routing-weighted", "budget")
GPU_PRECISION_POLICIES = ("full", "prefill-popularity")
# How a conversion to fewer bits chooses codes, best first; and how many weights may share a scale.
SOLVERS = ("hqq", "minmax")
GROUP_SIZES = (32, 64, 128)

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for suffix, base in (("", 1024), ("IB", 1024), ("B", 1000))
}


def parse_size(text: str | int) -> int:
    """Bytes from "4GiB", "4096MiB", "1.5G" (binary), "4GB" (decimal) or a plain number of bytes.

    Raises ConfigError when the text is no size or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is not a size; write for example 4GiB, 4096MiB or 1500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_amount(text: str | int | float, whole_bytes: int) -> int:
    """Bytes from a size ("4GiB"), a share in percent ("25%") or as a fraction ("0.75"; 1.0 is the whole) of ``whole_bytes``.

    A fraction must have a decimal point, so that "1" stays one byte and is refused as a budget later.
    Raises ConfigError when the text is none of these or a share above the whole.
    """
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*|\s*([01]?\.\d+)\s*", str(text))
    if not share:
        return parse_size(str(text))
    fraction = float(share[1]) / 100 if share[1] else float(share[2])
    if not 0 < fraction <= 1:
        raise ConfigError(f"{text!r} is not a share between 0 and 100 %")
    return int(fraction * whole_bytes)


def parse_host_compute(text: str | int | float) -> float | None:
    """ "off" is 0.0, "auto" None, else a share: "50%", "0.5", 1. Raises ConfigError for anything else."""
    if text in ("auto", "off"):
        return None if text == "auto" else 0.0
    try:
        share = float(text[:-1]) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"host_compute {text!r} is not auto, off or a share between 0 and 1")
    return share


def format_bytes(amount: float) -> str:
    """ "1.25 GiB" for people; three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return (
                f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}" if abs(amount) < 999 else f"{amount:.0f} {unit}"
            )
        amount /= 1024
    return f"{amount:.3g} TiB"


def cache_home() -> Path:
    """Where converted stores live: ``$FATE_HOME``, else ``~/.cache/fate``."""
    return Path(os.environ.get("FATE_HOME") or Path.home() / ".cache" / "fate")


def _one_of(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), list(choices), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} {value!r} is not one of {', '.join(choices)}{hint}")


@dataclass(frozen=True)
class OffloadConfig:
    """How a model is run. Every field is an option of the command line of the same name (``expert_cache`` is ``--expert-cache``).

    ram: memory for the whole process: a size ("4GiB"), a fraction of what is free ("0.75") or "auto" (most of it).
    device: where the model computes, "cpu" or "cuda"; None: on the GPU if ``vram`` says how much of it, else on the CPU.
    vram: memory on the GPU: a size, a fraction of what is free there or "auto" (most of it); then ``ram`` is for the experts
        behind it. None: "auto" with device "cuda".
    host_compute: on a GPU, the share of missing experts that the CPU computes instead of copying them: a fraction, "auto" (as
        ``fate doctor --measure`` measured) or "off". The CPU rounds otherwise, so tokens may differ from fully resident.
    cuda_graph: decode steps as one captured graph where the family allows it; without, the same kernels one by one.
    expert_cache: bytes for expert slots: a size or a percentage of all experts ("25%"); None: what the budget leaves.
    preset: a pair of policy and predictor: what does best here, or what a published system does.
    policy: which expert gives up its slot; predictor: which experts are read ahead; None: the preset's.
    look_ahead: how many layers ahead experts are predicted; further ones are read behind the nearer ones' reads.
    precision: how experts are stored; dense_precision: all other matrices (None: int8 beside quantized experts).
    precision_policy: how many of an INT4 expert's bits are read; anything but "full" trades exactness for bytes.
    context_length: tokens for which KV cache is set aside (prompt and answer together).
    io_threads: concurrent reads; one of them is always kept for demand reads.
    exact_activations: multiply quantized weights with fp32 activations instead of int8 ones.
    """

    ram: str | int | float = "auto"
    device: str | None = None
    vram: str | int | float | None = None
    host_compute: str | int | float = "off"
    cuda_graph: bool = True
    expert_cache: str | int | None = None
    preset: str = "best"
    policy: str | None = None
    predictor: str | None = None
    look_ahead: int = 1
    precision: str = "lossless"
    dense_precision: str | None = None
    precision_policy: str = "full"
    context_length: int = 2048
    io_threads: int = 4
    exact_activations: bool = False

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, PRESETS)
        _one_of("policy", self.policy_name, POLICIES)
        _one_of("predictor", self.predictor_name, PREDICTORS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("dense_precision", self.dense_precision or "lossless", PRECISIONS)
        _one_of("precision_policy", self.precision_policy, PRECISION_POLICIES)
        for name, least in (("context_length", 1), ("io_threads", 2), ("look_ahead", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.ram != "auto":
            parse_amount(self.ram, 1 << 40)
        if self.expert_cache is not None:
            parse_amount(self.expert_cache, 1 << 40)
        if self.device is not None:
            _one_of("device", self.device, DEVICES)
        if self.vram is not None:
            if self.vram != "auto":
                parse_amount(self.vram, 1 << 40)
            if self.device == "cpu":
                raise ConfigError("vram is memory of a GPU; leave it away, or device cpu")
        if parse_host_compute(self.host_compute) != 0 and not self.on_gpu:
            raise ConfigError("host_compute is of experts that a GPU misses; give vram too, or leave it away")
        if self.on_gpu and self.predictor is not None:
            raise ConfigError("on a GPU the next layer's router predicts; choose with preset, or run on the CPU")
        if self.on_gpu and self.precision_policy not in GPU_PRECISION_POLICIES:
            raise ConfigError(
                f"on a GPU precision_policy is one of {', '.join(GPU_PRECISION_POLICIES)}, not {self.precision_policy}"
            )

    @property
    def on_gpu(self) -> bool:
        """Whether the model computes on a GPU."""
        return self.device == "cuda" or (self.device is None and self.vram is not None)

    @property
    def policy_name(self) -> str:
        """The policy that is in force."""
        return self.policy or PRESETS[self.preset][0]

    @property
    def predictor_name(self) -> str:
        """The predictor that is in force."""
        return self.predictor or PRESETS[self.preset][1]

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> OffloadConfig:
        """Build from keyword options; a name that does not exist raises ConfigError and names its nearest neighbour."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; options are {', '.join(known)}"
                raise ConfigError(f"unknown option {name!r}{hint}")
        return cls(**options)
