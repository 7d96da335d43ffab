"""Sizes and fractions as people write them, and back."""

from __future__ import annotations

import re

from fate_moe.errors import ConfigError

__all__ = ["format_bytes", "parse_amount", "parse_host_compute", "parse_size"]

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for suffix, base in (("", 1024), ("IB", 1024), ("B", 1000))
}


def parse_size(text: str | int) -> int:
    """Bytes from "4GiB", "4096MiB", "1.5G" (binary), "4GB" (decimal) or a plain number of bytes.

    Raises ConfigError when the text is no size or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is not a size; write for example 4GiB, 4096MiB or 1500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_amount(text: str | int | float, whole_bytes: int) -> int:
    """Bytes from a size ("4GiB"), a percentage ("25%") or a fraction ("0.75"; 1.0 is the whole) of ``whole_bytes``.

    A fraction must have a decimal point, so that "1" stays one byte and is refused as a budget later.
    Raises ConfigError when the text is none of these or above the whole.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*|\s*([01]?\.\d+)\s*", str(text))
    if not found:
        return parse_size(str(text))
    fraction = float(found[1]) / 100 if found[1] else float(found[2])
    if not 0 < fraction <= 1:
        raise ConfigError(f"{text!r} is not between 0 and 100 %")
    return int(fraction * whole_bytes)


def parse_host_compute(text: str | int | float) -> float | None:
    """ "off" is 0.0, "auto" None, else a fraction: "50%", "0.5", 1. Raises ConfigError for anything else."""
    if text in ("auto", "off"):
        return None if text == "auto" else 0.0
    try:
        fraction = float(text[:-1]) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise ConfigError(f"host_compute {text!r} is not auto, off or a fraction between 0 and 1")
    return fraction


def format_bytes(amount: float) -> str:
    """ "1.25 GiB" for people; three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return (
                f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}" if abs(amount) < 999 else f"{amount:.0f} {unit}"
            )
        amount /= 1024
    return f"{amount:.3g} TiB"
