"""What a quantization can be asked for, by name. No torch: ``fate --help`` reads it."""

from __future__ import annotations

__all__ = ["GROUP_SIZES", "SOLVER_NAMES"]

# How a conversion to fewer bits chooses codes, best first (quant/solver.py); and how many weights may share a scale.
SOLVER_NAMES = ("hqq", "minmax")
GROUP_SIZES = (32, 64, 128)
