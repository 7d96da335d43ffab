"""What a blob's layout means to the GPU kernels, or why they cannot read it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton.language as tl

from fate_moe.core import BlobLayout
from fate_moe.errors import UnsupportedModelError
from fate_moe.kernels.elementary import gated
from fate_moe.store.format import PLANE_WIDTHS

__all__ = ["DeviceLayout", "device_layout"]

_DTYPES = {"BF16": tl.bfloat16, "F16": tl.float16, "F32": tl.float32}


@dataclass(frozen=True)
class Gate:
    """``elementary.gated``; ``limit`` 0 is none. ``mixed``: gate and up rows take turns."""

    mixed: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0


@dataclass(frozen=True)
class DeviceLayout:
    """One layer's experts as the kernels see them: [2 * width, cols] and [cols, width], and byte offsets of their parts in a blob.

    ``planes`` is 0 for unquantized weights and 8 for codes of one byte. ``gate_up`` and ``down`` are (scale or weights, zero, h or
    codes, m, l). ``*_bias``: where biases of ``bias_dtype`` lie, -1 for none. A view is the first p planes: ``views[p - 1]`` are
    its bits, ``view_bytes[p - 1]`` is how much of a blob it needs.
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
    gate: Gate = Gate()
    gate_up_bias: int = -1
    down_bias: int = -1
    bias_dtype: Any = tl.float32

    @property
    def gate_constants(self) -> dict[str, Any]:
        """What the kernels of gate_up take beside the rest."""
        gate = self.gate
        return {
            "ACT": self.activation, "ALPHA": gate.alpha, "LIMIT": gate.limit, "OFFSET": gate.up_offset, "MIXED": gate.mixed,
            "BIAS_AT": self.gate_up_bias, "BIAS": self.bias_dtype,
        }  # fmt: skip

    @property
    def down_constants(self) -> dict[str, Any]:
        """What those of down take."""
        return {"BIAS_AT": self.down_bias, "BIAS": self.bias_dtype}


def device_layout(layout: BlobLayout, shapes: dict[str, tuple[int, ...]], experts: Any) -> DeviceLayout:
    """The kernels' view of ``layout``; ``shapes`` ([out, in] by name) and ``experts`` (the transformers module) say the rest.

    Raises UnsupportedModelError naming every reason why not.
    """
    reasons = []
    gate, biases = _gate(experts), {"gate_up_proj_bias", "down_proj_bias"}
    if set(shapes) - biases != {"gate_up_proj", "down_proj"} or len(set(shapes) & biases) == 1:
        reasons.append(f"experts of {', '.join(sorted(shapes))} instead of gate_up_proj and down_proj")
    if not getattr(experts, "has_gate", True):
        reasons.append("they have no gate")
    if gate is None:
        reasons.append("the family combines gate and up in its own way")
    elif layout.precision == "lossless" and (gate != Gate() or biases <= set(shapes)):
        reasons.append(
            "unquantized experts with biases or gates of this kind have no kernel (those of precision int4 and int8 have)"
        )
    if getattr(experts, "has_post_expert_norm", False):
        reasons.append("a norm follows each expert")
    activation = "silu" if gate is not None and gate.mixed else _activation(getattr(experts, "act_fn", None))
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
    assert gate is not None
    bias = {part.name: part for part in layout.parts if part.name in biases}
    up_bias, down_bias = (bias[name].offset if name in bias else -1 for name in ("gate_up_proj_bias", "down_proj_bias"))
    kind = next((_DTYPES[part.dtype] for part in bias.values()), tl.float32)
    parts = {
        name: tuple(offsets.get(f"{name}.{part}", 0) for part in ("scale", "zero", "plane0", "plane1", "plane2"))  # type: ignore[misc]
        for name in shapes
    }
    planes = 8 if layout.precision == "int8" else 3
    ends = tuple(section.offset + section.length for section in layout.sections[1:])
    views = tuple(accumulate(layout.plane_widths))
    return DeviceLayout(
        cols, width, planes, tl.float16, activation, parts["gate_up_proj"], parts["down_proj"], views, ends, layout.length, gate,
        up_bias, down_bias, kind,
    )  # fmt: skip


def _gate(experts: Any) -> Gate | None:
    """How ``experts`` combine gate and up, recognised by what it computes where it is not the usual way; None: in no known way."""
    own = getattr(experts, "_apply_gate", None)
    if getattr(own, "__name__", "_default_apply_gate") == "_default_apply_gate":
        return Gate() if getattr(experts, "is_concatenated", True) else None
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    if own is None or not isinstance(alpha, float) or not isinstance(limit, float) or limit <= 0:
        return None
    gate = Gate(True, alpha, limit, 1.0)
    probe = torch.linspace(-2 * limit, 2 * limit, 64).view(2, 32).flip(0)
    known = gated(probe[:, ::2], probe[:, 1::2], "silu", alpha, limit, 1.0)
    return gate if torch.allclose(own(probe), known, rtol=1e-5, atol=1e-5) else None


def _activation(function: Any) -> str:
    """ "silu", "gelu" (the exact one), or "" for one that the kernels do not know; recognised by what it computes."""
    if function is None:
        return ""
    probe = torch.tensor([-2.0, -0.5, 0.25, 3.0])
    for name, known in (("silu", torch.nn.functional.silu), ("gelu", torch.nn.functional.gelu)):
        if torch.equal(function(probe), known(probe)):
            return name
    return ""
