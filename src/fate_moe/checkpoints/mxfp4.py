"""MXFP4, the format of gpt-oss: blocks of 32 four-bit floats that share one power of two.

``X_blocks`` U8 [E, out, in / 32, 16] has two codes in a byte, the low half first. ``X_scales`` U8 [E, out, in / 32] are exponents
with a bias of 127 (OCP Microscaling formats 1.0). They dequantize to ``X`` [E, in, out], the shape in transformers' module.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCKS", "SCALES", "dequantize_mxfp4", "mxfp4_shape"]

BLOCKS, SCALES = "_blocks", "_scales"

# E2M1: sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


def mxfp4_shape(blocks: tuple[int, ...], scales: tuple[int, ...] | None = None) -> tuple[int, int, int]:
    """The shape [E, in, out] of the parameter with blocks of shape ``blocks``.

    Raises ValueError for any other shape, and for ``scales`` (None: not compared) of a shape that does not match.
    """
    if len(blocks) != 4 or blocks[3] != 16:
        raise ValueError(f"blocks of shape {blocks}; expected [experts, out, in / 32, 16]")
    if scales is not None and scales != blocks[:-1]:
        raise ValueError(f"scales of shape {scales} for blocks of {blocks}")
    return blocks[0], blocks[2] * 32, blocks[1]


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The parameter, bf16 [E, in, out]. Exact: bf16 has the exponent range of the scales and more mantissa than the codes.

    Raises ValueError if the shapes of ``blocks`` and ``scales`` do not match.
    """
    if blocks.shape[:-1] != scales.shape:
        raise ValueError(f"scales of shape {tuple(scales.shape)} for blocks of {tuple(blocks.shape)}")
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [E, out, G, 32]
    values = torch.ldexp(_VALUES[codes.long()], scales.to(torch.int32).unsqueeze(-1) - 127)
    return values.flatten(-2).transpose(1, 2).bfloat16()
