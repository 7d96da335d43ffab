"""Values out of JSON that anyone may have written: each function returns its argument, or raises ValueError saying what it is."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["checksum", "count", "file_name", "items", "require", "text"]


def require(condition: bool, what: str) -> None:
    """Raises ValueError with ``what`` is wrong unless ``condition``."""
    if not condition:
        raise ValueError(what)


def count(value: Any) -> int:
    """A number of bytes or things: an int from 0 to 2**63 - 1 (true and false are none)."""
    require(type(value) is int and 0 <= value < 1 << 63, f"{value!r} is no number of bytes or things")
    return int(value)


def text(value: Any) -> str:
    """A string."""
    require(isinstance(value, str), f"{value!r} is no text")
    return str(value)


def items(value: Any) -> list[Any]:
    """A list."""
    require(isinstance(value, list), f"{value!r} is no list")
    return list(value)


def checksum(value: Any) -> str:
    """Sixteen hexadecimal digits."""
    require(bool(re.fullmatch("[0-9a-f]{16}", text(value))), f"{value!r} is no checksum")
    return str(value)


def file_name(value: Any) -> str:
    """The name of a safetensors file in the same folder."""
    require(bool(re.fullmatch(r"[\w-][\w.-]*\.safetensors", text(value))), f"{value!r} is no file name of a shard")
    return str(value)
