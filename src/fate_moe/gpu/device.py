"""The GPU of this machine: whether there is one that can be used, and how much of it is free."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from fate_moe.errors import ConfigError

__all__ = ["CONTEXT_BYTES", "Gpu", "find_gpu", "gpu_facts", "launches_early", "vram_peak", "why_no_gpu"]

# What a process takes beside its allocations: the driver's context, cuBLAS' and Triton's code. Measured on an H200 (torch 2.11):
# 526 MiB at first, 764 MiB once a model has run.
CONTEXT_BYTES = 800 << 20


@dataclass(frozen=True)
class Gpu:
    """``free_bytes`` is what this process may take, with what it holds already and its context."""

    name: str
    device: torch.device
    total_bytes: int
    free_bytes: int


def why_no_gpu() -> str | None:
    """Why no GPU can be used, and what to do; None where one can."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'fate-moe[gpu]'"
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) is built without CUDA; install one that is"
        return f"torch {torch.__version__} finds no NVIDIA GPU; check the driver with nvidia-smi"
    if torch.cuda.get_device_capability()[0] < 8:
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0, the first with bf16"
    return None


def find_gpu() -> Gpu:
    """The current CUDA device. Raises ConfigError, saying why, where none can be used."""
    if (reason := why_no_gpu()) is not None:
        raise ConfigError(f"no GPU can be used here: {reason}; or omit --vram and --device to run on the CPU")
    free, total = torch.cuda.mem_get_info()
    taken = torch.cuda.memory_reserved() + CONTEXT_BYTES
    return Gpu(torch.cuda.get_device_name(), torch.device("cuda", torch.cuda.current_device()), total, min(total, free + taken))


def gpu_facts() -> list[tuple[str, bool, str]]:
    """(name, whether it can be used, its memory or why not) of what is there, for people."""
    if (reason := why_no_gpu()) is not None:
        return [("GPU", False, reason)]
    facts = []
    for number in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(number)
        why = "used with --vram" if number == torch.cuda.current_device() else "one GPU is used; choose with CUDA_VISIBLE_DEVICES"
        facts.append((seen.name, number == torch.cuda.current_device(), f"{seen.total_memory / (1 << 30):.0f} GiB, {why}"))
    return facts


def launches_early(device: torch.device) -> bool:
    """Whether a kernel may be launched there before the one before it ends (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def vram_peak(device: torch.device) -> int:
    """The most bytes that this process ever had on the device, its context among them; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES if device.type == "cuda" else 0
