"""The embedded model: a small, trained Mixture-of-Experts checkpoint in block-scaled FP8 (see model/README.md)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL", "PROMPT"]

MODEL = Path(__file__).parent / "model"
PROMPT = "It was a dark night, and the old house"
