"""The plain torch twin of every kernel: slow where a kernel exists, and the definition of what a kernel computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from fate_moe.core import BlobLayout
from fate_moe.quant.planes import unpack

__all__ = ["dequantize", "expert_mlp", "expert_weights"]


def dequantize(
    planes: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    *,
    cols: int,
    group_size: int,
    widths: tuple[int, ...],
    num_planes: int | None = None,
) -> torch.Tensor:
    """The matrix [R, cols] in fp32 of a progressive-INT4 part: w = scale * q - zero, group by group (design: planes 2+1+1).

    ``planes[i]`` is U8 [R, G, group_size * widths[i] / 8], ``scale`` and ``zero`` are F16 [R, G]. With ``num_planes`` fewer than
    stored, a truncated code stands for the middle of its bin: the 2-bit view of 4-bit codes adds 1.5, the 3-bit view 0.5.
    """
    used = len(widths) if num_planes is None else num_planes
    codes = unpack(planes[:used], widths, group_size, used).float()  # [R, G * group_size], missing low bits zero
    codes += (2 ** sum(widths[used:]) - 1) / 2
    rows, groups = scale.shape
    grouped = codes.view(rows, groups, group_size)
    return (grouped * scale.float().unsqueeze(-1) - zero.float().unsqueeze(-1)).view(rows, -1)[:, :cols]


def expert_weights(
    layout: BlobLayout,
    parts: dict[str, torch.Tensor],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    num_planes: int | None = None,
) -> dict[str, torch.Tensor]:
    """One expert's parameters by name, each [out, in] (biases [out]) in ``dtype``, from the views ``parts`` of its slot.

    Without conversion these are the slot's own bytes; quantized matrices and other dtypes are made anew, and forgotten after use.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name in parts:
            weights[name] = parts[name].to(dtype)
            continue
        planes = [parts[f"{name}.plane{i}"] for i in range(len(layout.plane_widths))]
        weights[name] = dequantize(
            planes,
            parts[f"{name}.scale"],
            parts[f"{name}.zero"],
            cols=shape[1],
            group_size=layout.group_size,
            widths=layout.plane_widths,
            num_planes=num_planes,
        ).to(dtype)
    return weights


def expert_mlp(experts: Any, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert's output [num_tokens, hidden] for its tokens ``x`` [num_tokens, hidden], before the routing weight.

    ``experts`` is the transformers module: its flags and its ``_apply_gate`` say how the family combines gate and up.
    """
    if experts.has_gate:
        inner = experts._apply_gate(linear(x, weights["gate_up_proj"], weights.get("gate_up_proj_bias")))
    else:
        inner = experts.act_fn(linear(x, weights["up_proj"], weights.get("up_proj_bias")))
    out = linear(inner, weights["down_proj"], weights.get("down_proj_bias"))
    return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out  # type: ignore[no-any-return]
