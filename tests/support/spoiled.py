"""Residencies whose books are wrong."""

from __future__ import annotations

from typing import Any

__all__ = ["spoil"]


def spoil(residency: Any) -> None:
    """Put a slot in two places."""
    if hasattr(residency, "native"):
        residency.native.spoil()
    else:
        residency._table._free[0].append(0)
