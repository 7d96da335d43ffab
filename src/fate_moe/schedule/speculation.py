"""Speculation: tokens that may follow are read in the same pass as the last one, and kept as far as they are what is chosen anyway.

The token after each place is chosen from the logits of the tokens before it alone, by the same processors and with the same random
number as without drafts: the text, its log probabilities and the generator's state are the same, whatever was drafted. Only where
rows of one pass have the bits of single rows (``Executor.takes_drafts``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, TypeAlias

from fate_moe.core import Drafts
from fate_moe.schedule.gate import Gate
from fate_moe.schedule.lookup import PromptLookup

__all__ = ["MODES", "Drafter", "Mode", "Speculation"]

Mode: TypeAlias = Literal["auto", "off", "lookup"]
MODES: tuple[Mode, ...] = ("auto", "off", "lookup")
_MOST = 8  # drafted tokens of a pass: with the one before them few enough for the kernels of few rows
_LONG = 8  # tokens of a match from which on its drafts are accepted alike


class Speculation:
    """What is drafted for one model: ``auto`` drafts what pays as measured (``Gate``), ``lookup`` all that is found in the text, up
    to ``most`` tokens for a pass. ``counts``: where it is counted, a model's ``fate.drafts``.
    """

    def __init__(self, mode: Mode = "auto", most: int = _MOST, counts: Drafts | None = None) -> None:
        self.mode, self.most = mode, most
        self.gate, self.counts = Gate(most), counts or Drafts()


class Drafter:
    """Drafts for one text. A pass is told of by ``draft`` before it and ``passed`` behind it."""

    def __init__(self, speculation: Speculation) -> None:
        self._of, self._index = speculation, PromptLookup()
        self._kind = 0
        self._count = 0  # of drafted tokens in the pass
        self._began: float | None = None  # when the pass that drafts were asked for began

    @property
    def most(self) -> int:
        """So many tokens are drafted at once."""
        return self._of.most

    def draft(self, tokens: Sequence[int], room: int) -> list[int]:
        """At most ``room`` tokens that may follow ``tokens``, which begin with those of the call before."""
        self._index.extend(tokens[len(self._index) :])
        self._began = time.perf_counter()
        found, matched = self._index.draft(min(room, self._of.most))
        self._kind = min(matched, _LONG)
        if self._of.mode == "auto":
            del found[self._of.gate.choose(len(found), self._kind) :]
        self._count = len(found)
        return found

    def passed(self, accepted: int) -> None:
        """The pass was this text's alone; the first ``accepted`` drafts were kept. Of no effect where ``draft`` was not called."""
        if self._began is not None:
            counts = self._of.counts
            counts.drafted, counts.accepted = counts.drafted + self._count, counts.accepted + accepted
            self._of.gate.passed(time.perf_counter() - self._began, self._count, accepted, self._kind)
            self._began = None
