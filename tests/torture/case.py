"""What one case of the torture run is, and how it may end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fate_moe.errors import FateError

__all__ = ["GOOD", "Area", "Case", "Material", "Outcome", "WrongError", "refusal"]

# How a case may end: the right text, one clear error, another but valid input, or nothing to try on this machine.
GOOD = ("right", "refused", "another input", "skipped")


class WrongError(Exception):
    """What must not be: wrong text, a third state, a file left behind. The message is what happened."""


@dataclass(frozen=True)
class Material:
    """What all cases share, made once: ``home`` holds checkpoints, stores, traces; ``facts`` is what was computed from them."""

    home: Path
    facts: dict[str, Any]


@dataclass
class Case:
    """One case: all that it draws comes from ``dice``. ``work`` is an empty folder. ``kind`` names what it does, for the table."""

    number: int
    dice: Random
    work: Path
    material: Material
    kind: str = ""
    counts: dict[str, int] = field(default_factory=dict)  # for the table: faults injected, kills that hit


@dataclass(frozen=True)
class Outcome:
    """How case ``number`` of ``area`` ended: one of GOOD, or "wrong", "foreign error", "crash", "hang" or "memory"."""

    area: str
    number: int
    kind: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0
    grown_bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.outcome in GOOD


@dataclass(frozen=True)
class Area:
    """A kind of hostility. ``run`` does one case and returns how it ended, one of GOOD; what it raises is a failure.

    ``limit_seconds``: a case that takes longer hangs. ``most_bytes``: a case may make the process grow by so much. ``share``: of
    the time of a run. ``short``: cases in the short form.
    """

    name: str
    what: str
    run: Callable[[Case], str]
    share: float
    short: int
    limit_seconds: float = 60.0
    most_bytes: int = 256 << 20


def refusal(action: Callable[[], object]) -> str | None:
    """The message of the FateError that ``action`` raises, which must be one printable line; None if it raises none."""
    try:
        action()
    except FateError as error:
        said = str(error)
        if "\n" in said or not 10 < len(said) < 2000:
            raise WrongError(f"the error is not one clear line: {said[:200]!r}") from error
        return said
    return None
