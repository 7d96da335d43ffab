"""The C++ extension: whether it is there, and numbers for what it takes as numbers. The kernels themselves are in ``csrc``."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fate_moe import switches
from fate_moe.core import BlobLayout
from fate_moe.kernels.extension import native, why_not
from fate_moe.quant.choices import GROUP_SIZES

__all__ = [
    "BF16",
    "DTYPES",
    "F32",
    "INT8",
    "MOST_TURNED",
    "PLANES",
    "ROPES",
    "WIDTHS",
    "kernel_facts",
    "matrix_place",
    "multiplies_bf16",
    "native",
    "why_not",
]

# The extension's enumerations (csrc/ops.h).
PLANES, INT8, BF16, F32 = 3, 8, 16, 32
ROPES = ("halves", "pairs", "pairs apart")
MOST_TURNED = 512  # channels of a head
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DTYPE_NAMES = {"F32": 0, "BF16": 1, "F16": 2}
WIDTHS = {(2, 1, 1): PLANES, (8,): INT8}
_LANES = 64  # columns that the product of bf16 takes at a time
# Best first, and what a processor needs for each (csrc/*.cpp: *_ops).
_VNNI = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512vbmi", "gfni")
_NEEDS = {
    "amx": ("x86", (*_VNNI, "amxtile", "amxint8")),
    "avx512-vnni": ("x86", _VNNI),
    "avx-vnni": ("x86", ("avx2", "fma", "f16c", "avxvnni", "gfni")),
    "avx2": ("x86", ("avx2", "fma", "f16c")),
    "neon-i8mm": ("arm", ("asimddp", "i8mm")),
    "neon-dot": ("arm", ("asimddp",)),
    "neon": ("arm", ("asimd",)),
    "portable": ("", ()),
}


def multiplies_bf16(columns: int) -> bool:
    """Whether the extension multiplies bf16 matrices of so many ``columns``."""
    return native is not None and columns % _LANES == 0


def kernel_facts() -> list[tuple[str, bool, str]]:
    """(instruction set, whether it is the one used, why or why not), best first; last, where nothing is built, torch."""
    facts = []
    available = native.instruction_sets() if native is not None else []
    for name, (family, features) in _NEEDS.items():
        used = native is not None and native.instruction_set() == name
        lacking = [feature for feature in features if feature not in _processor_features()]
        if name in available:
            why = f"used, {native.team()}" if used else "available, slower" if switches.kernels() is None else "available"
        elif family and family != _family():
            why = f"for {family} processors"
        elif lacking:
            why = f"this processor lacks {', '.join(lacking)}"
        elif native is None:
            why = "not built" if switches.use_native() else "turned off"
        else:
            why = "this build was made without it"
        facts.append((name, used, why))
    return facts if native is not None else [*facts, ("torch", True, why_not() or "")]


def _family() -> str:
    machine = platform.machine().lower()
    return "x86" if machine in ("x86_64", "amd64", "i386", "i686") else "arm" if machine in ("aarch64", "arm64") else machine


def _processor_features() -> set[str]:
    """Linux' names of this processor's features, without underscores; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            line = next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return set()
    return {name.replace("_", "") for name in line.partition(":")[2].split()}


def matrix_place(layout: BlobLayout, name: str, shape: tuple[int, ...], bias: str | None = None) -> Any:
    """The extension's Place of matrix ``name`` [rows, cols] in blobs of ``layout``; a str that says why it has no kernel.

    ``bias`` names the part that is added to each row, if the layout has it.
    """
    parts = {part.name: part for part in layout.parts}
    rows, cols = shape
    bias_part = parts.get(bias or "")
    bias_at, bias_dtype = (bias_part.offset, _DTYPE_NAMES.get(bias_part.dtype)) if bias_part else (-1, 0)
    if bias_dtype is None:
        return f"{bias} is {bias_part.dtype if bias_part else ''}"
    if name in parts:
        if parts[name].dtype != "BF16":
            return f"{name} is {parts[name].dtype}; of unquantized weights only bf16 has a kernel"
        return native.Place.make(BF16, rows, cols, [parts[name].offset], 0, 0, bias_at, bias_dtype)
    kind = WIDTHS.get(layout.plane_widths)
    if kind is None or layout.group_size not in GROUP_SIZES:
        return f"planes of {layout.plane_widths} bits in groups of {layout.group_size} have no kernel"
    planes = [parts[f"{name}.plane{i}"].offset for i in range(len(layout.plane_widths))]
    scale, zero = parts[f"{name}.scale"].offset, parts[f"{name}.zero"].offset
    return native.Place.make(kind, rows, cols, planes, scale, zero, bias_at, bias_dtype, layout.group_size)
