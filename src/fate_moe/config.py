"""Options. No torch: ``fate --help`` reads its defaults from here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from fate_moe.core import KV_FORMATS, PRECISIONS
from fate_moe.errors import ConfigError
from fate_moe.registry import POLICIES, PREDICTORS, PRESETS, check_name
from fate_moe.units import Range, parse_amount, parse_host_compute, parse_size

__all__ = ["COUNTS", "DEVICES", "PRECISION_POLICIES", "OffloadConfig"]

DEVICES = ("cpu", "cuda")
# How much of a missing expert is read; only "full" keeps every number.
PRECISION_POLICIES = ("full", "prefill-popularity", "routing-weighted", "budget")
GPU_PRECISION_POLICIES = ("full", "prefill-popularity")
# Each read takes a thread; more than a few hundred only meet the limits of the system.
COUNTS = {
    "context_length": Range(1, (1 << 31) - 1, whole=True),
    "io_threads": Range(2, 256, whole=True),
    "look_ahead": Range(1, 1024, whole=True),
}


@dataclass(frozen=True)
class OffloadConfig:
    """How a model is run. Every field is an option of the command line of the same name (``expert_cache`` is ``--expert-cache``).

    ram: memory for the whole process: a size ("4GiB"), a fraction of what is free ("0.75") or "auto" (most of it).
    device: where the model computes, "cpu" or "cuda"; None: on the GPU if ``vram`` says how much of it, else on the CPU.
    vram: memory on the GPU: a size, a fraction of what is free there or "auto" (most of it); then ``ram`` is for the experts
        behind it. None: "auto" with device "cuda".
    host_compute: on a GPU, the fraction of missing experts that the CPU computes instead of copying them: a fraction, "auto" (as
        many as a measurement while loading says; none where that would change numbers, as with lossless experts) or "off".
    cuda_graph: decode steps as one captured graph where the family allows it; without, the same kernels one by one.
    expert_cache: bytes for expert slots: a size or a percentage of all experts ("25%"); None: what the budget leaves.
    preset: what works best here, or what a published system does (registry.PRESETS): a policy and a predictor, on a GPU their like.
    policy: which expert gives up its slot (registry.POLICIES); on a GPU, its slot in RAM where experts come from the disk. None:
        the preset's. predictor: which experts are read ahead (registry.PREDICTORS), not on a GPU. None: the preset's.
    look_ahead: how many layers ahead experts are predicted, not on a GPU; further ones are read behind the nearer ones' reads.
    precision: how experts are stored; dense_precision: all other matrices (None: int8 beside quantized experts).
    precision_policy: how many of an INT4 expert's bits are read; anything but "full" trades exactness for bytes.
    context_length: tokens for which KV cache is set aside (prompt and answer together).
    kv_cache: how the KV cache holds numbers, "bf16" or, where the extension runs the whole model on the CPU, "int8" (about half).
    prefix_cache: how much of the KV cache may hold beginnings of texts that ended, for texts that begin alike: a size, a percentage
        or "off". For servers and chats on the CPU, of models that the extension runs whole.
    prefix_cache_disk: how much of the disk they may take, under ``$FATE_HOME/kv``, to be there after a restart: a size or "off".
    io_threads: concurrent reads; one of them is always left for demand reads.
    exact_activations: on the CPU, multiply quantized weights with fp32 activations instead of int8 ones.
    """

    ram: str | int | float = "auto"
    device: str | None = None
    vram: str | int | float | None = None
    host_compute: str | int | float = "auto"
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
    kv_cache: str = "bf16"
    prefix_cache: str | int = "100%"
    prefix_cache_disk: str | int = "off"
    io_threads: int = 4
    exact_activations: bool = False

    def __post_init__(self) -> None:
        check_name("preset", self.preset, PRESETS)
        check_name("policy", self.policy_name, POLICIES)
        check_name("predictor", self.predictor_name, PREDICTORS)
        check_name("precision", self.precision, PRECISIONS)
        check_name("dense_precision", self.dense_precision or "lossless", PRECISIONS)
        check_name("kv_cache", self.kv_cache, KV_FORMATS)
        check_name("precision_policy", self.precision_policy, PRECISION_POLICIES)
        for name, allowed in COUNTS.items():
            if not allowed.holds(value := getattr(self, name)):
                raise ConfigError(f"{name} is {allowed}, not {value!r}")
        for name, without in (("ram", "auto"), ("expert_cache", None), ("vram", None), ("prefix_cache", "off")):
            if (value := getattr(self, name)) != without and (name, value) != ("vram", "auto"):
                try:
                    parse_amount(value, 1 << 40)
                except ConfigError as error:
                    raise ConfigError(f"{name}: {error}") from error
        for name in ("cuda_graph", "exact_activations"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} is True or False, not {value!r}")
        if self.prefix_cache_disk != "off":
            try:
                parse_size(self.prefix_cache_disk)
            except ConfigError as error:
                raise ConfigError(f"prefix_cache_disk: {error}; or off") from error
        if self.device is not None:
            check_name("device", self.device, DEVICES)
        if self.vram is not None and self.device == "cpu":
            raise ConfigError("vram is memory of a GPU; omit it, or omit device cpu")
        parse_host_compute(self.host_compute)
        if not self.keeps_experts and self.expert_cache is not None:
            raise ConfigError(f"preset {self.preset} keeps no experts; omit expert_cache, or choose another preset")
        if self.on_gpu:
            self._check_gpu()
        else:
            self._check_cpu()

    def _check_gpu(self) -> None:
        """Refuse what has no meaning on a GPU."""
        if not self.keeps_experts:
            raise ConfigError(f"preset {self.preset} is for the CPU; omit vram, or choose another preset")
        if self.predictor is not None:
            raise ConfigError("on a GPU the next layer's router predicts; choose with preset, or run on the CPU")
        if self.look_ahead != 1:
            raise ConfigError("on a GPU experts are predicted one layer ahead; omit look_ahead, or run on the CPU")
        if self.precision_policy not in GPU_PRECISION_POLICIES:
            raise ConfigError(
                f"on a GPU precision_policy is one of {', '.join(GPU_PRECISION_POLICIES)}, not {self.precision_policy}"
            )
        if self.kv_cache != "bf16":
            raise ConfigError("on a GPU the KV cache is bf16; omit kv_cache, or run on the CPU")
        if self.exact_activations:
            raise ConfigError("on a GPU quantized experts get int8 activations; omit exact_activations, or run on the CPU")

    def _check_cpu(self) -> None:
        """Refuse what has a meaning on a GPU alone."""
        if parse_host_compute(self.host_compute):
            raise ConfigError("host_compute is for the experts that a GPU misses; give vram too, or omit it")
        if not self.cuda_graph:
            raise ConfigError("cuda_graph is for a GPU; give vram too, or omit it")

    @property
    def on_gpu(self) -> bool:
        """Whether the model computes on a GPU."""
        return self.device == "cuda" or (self.device is None and self.vram is not None)

    @property
    def prefix_disk_bytes(self) -> int:
        """What ``prefix_cache_disk`` says; 0: nothing is kept on the disk."""
        return 0 if "off" in (self.prefix_cache, self.prefix_cache_disk) else parse_size(self.prefix_cache_disk)

    @property
    def policy_name(self) -> str:
        """The policy that is in force."""
        return self.policy or PRESETS[self.preset].policy

    @property
    def predictor_name(self) -> str:
        """The predictor that is in force."""
        return self.predictor or PRESETS[self.preset].predictor

    @property
    def keeps_experts(self) -> bool:
        """Whether experts use what room the budget leaves (see registry.Preset)."""
        return PRESETS[self.preset].keeps_experts

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> OffloadConfig:
        """Build from keyword options; a name that does not exist raises ConfigError and names the nearest one."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; options are {', '.join(known)}"
                raise ConfigError(f"unknown option {name!r}{hint}")
        return cls(**options)
