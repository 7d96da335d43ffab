"""Checks of values from untrusted JSON: each function returns its argument, or raises ValueError that describes it."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["checksum", "count", "file_name", "items", "require", "text"]


def require(condition: bool, what: str) -> None:
    """Raises ValueError with the text ``what`` unless ``condition``."""
    if not condition:
        raise ValueError(what)


def count(value: Any) -> int:
    """A number of bytes or things: an int from 0 to 2**63 - 1 (not true or false)."""
    require(type(value) is int and 0 <= value < 1 << 63, f"{value!r} is not a count")
    return int(value)


def text(value: Any) -> str:
    """A string."""
    require(isinstance(value, str), f"{value!r} is not a string")
    return str(value)


def items(value: Any) -> list[Any]:
    """A list."""
    require(isinstance(value, list), f"{value!r} is not a list")
    return list(value)


def checksum(value: Any) -> str:
    """Sixteen hexadecimal digits."""
    require(bool(re.fullmatch("[0-9a-f]{16}", text(value))), f"{value!r} is not a checksum")
    return str(value)


def file_name(value: Any) -> str:
    """The name of a safetensors file in the same folder."""
    require(bool(re.fullmatch(r"[\w-][\w.-]*\.safetensors", text(value))), f"{value!r} is not the file name of a shard")
    return str(value)
