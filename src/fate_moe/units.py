"""Sizes and fractions as people write them, and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fate_moe.errors import ConfigError

__all__ = ["Range", "format_bytes", "parse_amount", "parse_host_compute", "parse_size"]

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate(("K", "M", "G", "T"), start=1)
    for suffix, base in (("", 1024), ("IB", 1024), ("B", 1000))
}


# More bytes than any machine has: beyond it, numbers are slips of the keyboard.
_MOST_BYTES = 1 << 60


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes: from ``low`` (``above``: not ``low`` itself) to ``high``, or ``whole`` ones only."""

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def parse(self, text: str) -> int | float:
        """The number that ``text`` says in decimal digits.

        Raises ValueError for any other text, and ConfigError for a number out of the range; both say what was expected.
        """
        form = r"[+-]?[0-9]{1,400}" if self.whole else r"[+-]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][+-]?[0-9]{1,4})?"
        if not re.fullmatch(form, text.strip(" ")):
            raise ValueError(f"{text!r} is not {self}")
        value = int(text) if self.whole else float(text)
        if not self.holds(value):
            raise ConfigError(f"{text} is not {self}")
        return value

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is a number of this range (true and false are none)."""
        kinds = int if self.whole else int | float
        return (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
            and not (self.above and value == self.low)
        )

    def __str__(self) -> str:
        low, high = (int(self.low), int(self.high)) if self.whole else (f"{self.low:g}", f"{self.high:g}")
        return f"a {'whole ' if self.whole else ''}number {'above' if self.above else 'of at least'} {low} and at most {high}"


def parse_size(text: str | int) -> int:
    """Bytes from "4GiB", "4096MiB", "1.5G" (binary), "4GB" (decimal) or a plain number of bytes.

    Raises ConfigError when the text is no size, less than a byte or more than an exbibyte.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 1 <= (num_bytes := float(match[1]) * unit) <= _MOST_BYTES:
        raise ConfigError(f"{text!r} is not a size; write for example 4GiB, 4096MiB or 1500MB")
    return int(num_bytes)


def parse_amount(text: str | int | float, whole_bytes: int) -> int:
    """Bytes from a size ("4GiB"), a percentage ("25%") or a fraction ("0.75"; 1.0 is the whole) of ``whole_bytes``.

    A fraction must have a decimal point, so that "1" stays one byte and is refused as a budget later.
    Raises ConfigError when the text is none of these or above the whole.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*|\s*([0-9]*\.[0-9]+)\s*", str(text))
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
    except (TypeError, ValueError, OverflowError):
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
