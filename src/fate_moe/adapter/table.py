"""Which families were run, and how that went: the table that the test of all families writes beside this file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["FAMILIES_FILE", "Family", "known_families", "tried_families", "tried_in", "tried_with"]

FAMILIES_FILE = Path(__file__).with_name("families.json")


@dataclass(frozen=True)
class Family:
    """One model type. ``status`` is "ok" or the reason why it does not run.

    ``look_ahead`` is the share of MoE blocks whose router, asked before it runs, named the experts that it then used ("4/4");
    ``keys`` are the checkpoint's names of one layer's experts, as they were read. ``layers`` is "recognised" if all layers are
    plain (layers/plain.py), else the reasons of those that are not. ``prefixes`` is "reused: " and what is kept if servers and
    chats read a text from where it differs from earlier ones (with quantized weights, on the CPU), else why not.
    """

    family: str
    model: str
    status: str
    look_ahead: str = ""
    keys: tuple[str, ...] = ()
    layers: str = ""
    prefixes: str = ""

    def in_short(self) -> str:
        """What of a layer our kernels run: all of it, or its MoE block, and the first reason why not the rest."""
        if self.status != "ok" or not self.layers:
            return ""
        if self.layers != "recognised":
            return f"MoE block only: {self.layers.partition('; ')[0]}"
        word, _, kept = self.prefixes.partition(": ")
        return f"whole layers, prefixes {f'reused ({kept})' if word == 'reused' else f'read again: {self.prefixes}'}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def tried_with() -> str:
    """The version of transformers that ``tried_families`` speaks of."""
    return str(json.loads(FAMILIES_FILE.read_text())["transformers"])


def tried_in() -> float:
    """How many seconds it took to try ``tried_families``."""
    return float(json.loads(FAMILIES_FILE.read_text())["seconds"])


def tried_families() -> list[Family]:
    """Every family that was tried, by name."""
    rows = json.loads(FAMILIES_FILE.read_text())["families"]
    return [Family(**{**row, "keys": tuple(row["keys"])}) for row in rows]


def known_families(installed: list[str]) -> list[Family]:
    """The tested families, and beside them those of ``installed`` (of the installed transformers) that were not tried yet."""
    rows = {row.family: row for row in tried_families()}
    untried = f"not tried yet (the table is of transformers {tried_with()})"
    new = [Family(name, "", untried) for name in installed if name not in rows]
    return sorted([*rows.values(), *new], key=lambda row: row.family)
