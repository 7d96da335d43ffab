"""What a blob's layout means to the GPU kernels, or why they cannot read it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton.language as tl

from fate_moe.core import BlobLayout
from fate_moe.errors import UnsupportedModelError
from fate_moe.store.format import PLANE_WIDTHS

__all__ = ["DeviceLayout", "device_layout"]

_DTYPES = {"BF16": tl.bfloat16, "F16": tl.float16, "F32": tl.float32}


@dataclass(frozen=True)
class DeviceLayout:
    """One layer's experts as the kernels see them: [2 * width, cols] and [cols, width], and byte offsets of their parts in a blob.

    ``planes`` is 0 for unquantized weights and 8 for codes of one byte. ``gate_up`` and ``down`` are (scale or weights, zero, h or
    codes, m, l). A view is the first p planes: ``views[p - 1]`` are its bits, ``view_bytes[p - 1]`` is how much of a blob it needs.
    """

    cols: int
    width: int
    planes: int
    dtype: Any
    activation: str
    gate_up: tuple[int, int, int, int, int]
    down: tuple[int, int, int, int, int]
    views: tuple[int, ...]
    view_bytes: tuple[int, ...]
    blob_bytes: int


def device_layout(layout: BlobLayout, shapes: dict[str, tuple[int, ...]], experts: Any) -> DeviceLayout:
    """The kernels' view of ``layout``; ``shapes`` ([out, in] by name) and ``experts`` (the transformers module) say the rest.

    Raises UnsupportedModelError naming every reason why not.
    """
    reasons = []
    if set(shapes) != {"gate_up_proj", "down_proj"}:
        reasons.append(f"experts of {', '.join(sorted(shapes))} instead of gate_up_proj and down_proj")
    if not getattr(experts, "has_gate", True) or not getattr(experts, "is_concatenated", True):
        reasons.append("gate and up rows are not one after the other")
    if getattr(getattr(experts, "_apply_gate", None), "__name__", "_default_apply_gate") != "_default_apply_gate":
        reasons.append("the family combines gate and up in its own way")
    if getattr(experts, "has_post_expert_norm", False):
        reasons.append("a norm follows each expert")
    activation = _activation(getattr(experts, "act_fn", None))
    if not activation:
        reasons.append(f"activation {getattr(experts, 'act_fn', None)}")
    if layout.precision != "lossless" and layout.plane_widths != PLANE_WIDTHS[layout.precision]:
        reasons.append(f"planes of {layout.plane_widths} bits")
    if layout.precision != "lossless" and layout.group_size != 64:
        reasons.append(f"weights in groups of {layout.group_size} (those of a store made with --group-size 64 could be read)")
    if reasons:
        raise UnsupportedModelError(f"the GPU kernels cannot run these experts: {'; '.join(reasons)}; run them on the CPU")
    offsets = {part.name: part.offset for part in layout.parts}
    cols, width = shapes["gate_up_proj"][1], shapes["gate_up_proj"][0] // 2
    if layout.precision == "lossless":
        parts = {name: (offsets[name], 0, 0, 0, 0) for name in shapes}
        dtype = _DTYPES[layout.parts[0].dtype]
        return DeviceLayout(
            cols, width, 0, dtype, activation, parts["gate_up_proj"], parts["down_proj"], (), (layout.length,), layout.length
        )
    parts = {
        name: tuple(offsets.get(f"{name}.{part}", 0) for part in ("scale", "zero", "plane0", "plane1", "plane2"))  # type: ignore[misc]
        for name in shapes
    }
    planes = 8 if layout.precision == "int8" else 3
    ends = tuple(section.offset + section.length for section in layout.sections[1:])
    views = tuple(accumulate(layout.plane_widths))
    return DeviceLayout(
        cols, width, planes, tl.float16, activation, parts["gate_up_proj"], parts["down_proj"], views, ends, layout.length
    )


def _activation(function: Any) -> str:
    """ "silu", "gelu" (the exact one), or "" for one that the kernels do not know; recognised by what it computes."""
    if function is None:
        return ""
    probe = torch.tensor([-2.0, -0.5, 0.25, 3.0])
    for name, known in (("silu", torch.nn.functional.silu), ("gelu", torch.nn.functional.gelu)):
        if torch.equal(function(probe), known(probe)):
            return name
    return ""
