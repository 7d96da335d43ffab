"""The plain torch twin of every kernel: slow where a kernel exists, and the definition of what a kernel computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, pad

from fate_moe.core import BlobLayout
from fate_moe.quant.planes import unpack

__all__ = ["dequantize", "expert_mlp", "expert_weights", "linear_quantized", "quantize_activations"]


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


def quantize_activations(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 activations: codes [T, G, group_size] (as fp32) and scale [T, G] with x ~ scale * code, from ``x`` fp32 [T, C].

    scale = amax / 127 of each group, codes are rounded to nearest even; columns beyond C count as zeros. A group that is not finite
    everywhere has scale NaN.
    """
    cols = x.shape[1]
    grouped = pad(x, (0, -cols % group_size)).view(len(x), -1, group_size)
    amax = grouped.abs().amax(2)
    finite = amax.isfinite()
    inverse = torch.where(finite & (amax >= 1e-30), 127 / amax, 0.0)
    codes = torch.where(finite.unsqueeze(2), grouped * inverse.unsqueeze(2), 0.0).round()
    return codes, torch.where(finite, amax / 127, torch.nan)


def linear_quantized(
    x: torch.Tensor,
    planes: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor,
    *,
    group_size: int,
    widths: tuple[int, ...],
    num_planes: int | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """``x`` fp32 [T, C] times a quantized matrix [R, C] (see ``dequantize``): fp32 [T, R].

    x is rounded to int8 first, in the weights' groups, unless ``exact`` (then xq = x and sx = 1). Scales are applied to each
    group's sums, not to weights: y = sum over groups of (scale * sx) * (q . xq) + (scale * middle - zero) * (sx * sum(xq)).
    """
    used = len(widths) if num_planes is None else num_planes
    rows, groups = scale.shape
    codes = unpack(planes[:used], widths, group_size, used).view(rows, groups, group_size).float()
    if exact:
        q = pad(x, (0, -x.shape[1] % group_size)).view(len(x), groups, group_size)
        sx = torch.ones(len(x), groups)
    else:
        q, sx = quantize_activations(x, group_size)
    products = torch.einsum("rgk,tgk->trg", codes, q)  # of integers: at most 128 * 255 * 127, exact in fp32
    middle = (2 ** sum(widths[used:]) - 1) / 2
    offset = scale.float() * middle - zero.float()
    y: torch.Tensor = (scale.float() * sx.unsqueeze(1) * products).sum(2) + (sx * q.sum(2)) @ offset.T
    return y


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
