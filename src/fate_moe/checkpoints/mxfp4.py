"""MXFP4 as gpt-oss is published in it: blocks of 32 four-bit floats that share one power of two.

``X_blocks`` U8 [E, out, in / 32, 16] has two codes in a byte, the low half first; ``X_scales`` U8 [E, out, in / 32] is the exponent
with a bias of 127 (OCP Microscaling formats 1.0). Together they mean ``X`` [E, in, out], as transformers' module holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCKS", "SCALES", "dequantize_mxfp4", "mxfp4_shape"]

BLOCKS, SCALES = "_blocks", "_scales"

# E2M1: sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


def mxfp4_shape(blocks: tuple[int, ...]) -> tuple[int, int, int]:
    """[E, in, out] of the parameter whose blocks are of shape ``blocks``. Raises ValueError where these are no such blocks."""
    if len(blocks) != 4 or blocks[3] != 16:
        raise ValueError(f"blocks of shape {blocks} where [experts, out, in / 32, 16] is meant")
    return blocks[0], blocks[2] * 32, blocks[1]


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """bf16 [E, in, out]; exact, for bf16 has the exponents of the scales and more mantissa than the codes.

    Raises ValueError where ``scales`` are not of the blocks.
    """
    if blocks.shape[:-1] != scales.shape:
        raise ValueError(f"scales of shape {tuple(scales.shape)} for blocks of {tuple(blocks.shape)}")
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [E, out, G, 32]
    values = torch.ldexp(_VALUES[codes.long()], scales.to(torch.int32).unsqueeze(-1) - 127)
    return values.flatten(-2).transpose(1, 2).bfloat16()
