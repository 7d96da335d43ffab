"""Dense weights that stay quantized in VRAM: one byte a weight, whatever the store has.

INT8 codes lie here as in the store; INT4 ones are widened, with the same numbers: products with three planes would cost about ten
instructions a weight, and a decode step would wait for those instead of the bytes they save.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import nn
from torch.nn.functional import linear, pad

from fate_moe.core import BlobLayout
from fate_moe.kernels.triton_expand import expand_kernel
from fate_moe.quant.blob import views
from fate_moe.quant.planes import unpack

__all__ = ["ByteLinear", "joined"]

GROUP = 64
# Elements that are numbers, or codes on their way to one byte, at a time: 32 MiB of bf16. Most matrices are one such tile.
_AT_ONCE = 1 << 24
_UNPACKED_AT_ONCE = 1 << 20  # unpacking planes takes several copies of the codes


class ByteLinear(nn.Module):
    """``nn.Linear`` with weight[r, c] = scale[r, c // 64] * codes[r, c] - zero[r, c // 64].

    ``codes`` uint8 [out, groups * 64], ``scale`` and ``zero`` fp16 [out, groups]; ``cols`` of the codes count.
    """

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, cols: int, bias: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.training = False
        self.codes, self.scale, self.zero = codes, scale, zero
        self.out_features, self.in_features = codes.shape[0], cols
        self.bias = bias
        self._dtype = dtype

    @classmethod
    def from_blob(cls, blob: torch.Tensor, layout: BlobLayout, shape: tuple[int, int], bias: Any, dtype: torch.dtype) -> ByteLinear:
        """From a dense blob of a store (part ``weight``), on the device where it is to be; ``dtype`` is the model's. One plane of
        bytes stays where it lies, in the blob."""
        parts = views(layout, blob)
        if layout.group_size != GROUP:
            raise ValueError(f"groups of {layout.group_size} instead of {GROUP}")
        planes = [parts[f"weight.plane{i}"] for i in range(len(layout.plane_widths))]
        scale, zero = parts["weight.scale"], parts["weight.zero"]
        rows, groups = scale.shape
        if layout.plane_widths == (8,):
            return cls(planes[0].view(rows, groups * GROUP), scale, zero, shape[1], bias, dtype)
        codes = torch.empty(rows, groups * GROUP, dtype=torch.uint8, device=blob.device)
        step = max(1, _UNPACKED_AT_ONCE // codes.shape[1])
        for first in range(0, rows, step):
            some = [plane[first : first + step] for plane in planes]
            codes[first : first + step] = unpack(some, layout.plane_widths, GROUP)
        return cls(codes, scale.clone(), zero.clone(), shape[1], bias, dtype)

    @classmethod
    def rounded(cls, weight: torch.Tensor, bias: Any = None) -> ByteLinear:
        """From numbers [out, in], codes spread between each group's smallest and largest."""
        rows, cols = weight.shape
        grouped = pad(weight.float(), (0, -cols % GROUP)).view(rows, -1, GROUP)
        low, high = grouped.amin(2), grouped.amax(2)
        zero, scale = (-low).half(), ((high - low) / 255).half()
        step = scale.float().clamp(min=1e-8)[..., None]
        codes = ((grouped + zero.float()[..., None]) / step).round_().clamp_(0, 255).to(torch.uint8)
        return cls(codes.view(rows, -1), scale, zero, cols, bias, weight.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The numbers, made anew."""
        return self._numbers(0, self.out_features, self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out] of ``x`` [..., in]; no more than a tile of the matrix is ever written out."""
        step = max(1, _AT_ONCE // self.in_features)
        made = []
        for first in range(0, self.out_features, step):
            bias = None if self.bias is None else self.bias[first : first + step]
            made.append(linear(x, self._numbers(first, min(step, self.out_features - first), x.dtype), bias))
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def _numbers(self, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """[count, in] from row ``first`` on."""
        rows = slice(first, first + count)
        out = torch.empty(count, self.in_features, dtype=dtype, device=self.codes.device)
        expand_kernel[(triton.cdiv(count, 16), triton.cdiv(self.in_features, 256))](
            self.codes[rows], self.scale[rows], self.zero[rows], out, count, self.in_features, self.scale.shape[1],
            BN=16, BK=256, num_warps=4,
        )  # fmt: skip
        return out


Matrix = torch.Tensor | ByteLinear


def joined(linears: list[Any]) -> Matrix:
    """The weights of ``linears`` as one matrix; theirs become views of it, so that nothing is stored twice."""
    if len(linears) == 1:
        return linears[0] if isinstance(linears[0], ByteLinear) else linears[0].weight.data
    sizes = [module.out_features for module in linears]
    if not all(isinstance(module, ByteLinear) for module in linears):
        whole = torch.cat([module.weight.data for module in linears])
        for module, part in zip(linears, torch.split(whole, sizes), strict=True):
            module.weight.data = part
        return whole
    first = linears[0]
    together = {name: torch.cat([getattr(module, name) for module in linears]) for name in ("codes", "scale", "zero")}
    for name, tensor in together.items():
        for module, part in zip(linears, torch.split(tensor, sizes), strict=True):
            setattr(module, name, part)
    return ByteLinear(together["codes"], together["scale"], together["zero"], first.in_features, None, first._dtype)
