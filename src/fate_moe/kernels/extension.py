"""The C++ extension, imported once for all: whether it is there, or why not. No torch."""

from __future__ import annotations

from typing import Any

__all__ = ["native", "why_missing"]

native: Any = None  # the module; None where it cannot be imported
why_missing = ""  # the import's error then
try:
    from fate_moe.kernels import _native  # type: ignore[attr-defined, unused-ignore]

    native = _native
except ImportError as error:
    why_missing = str(error)
