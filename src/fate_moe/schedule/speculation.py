"""Speculation: tokens that may follow are read in the same pass as the last one, and kept as far as they are what is chosen anyway.

The token after each place is chosen from the logits of the tokens before it alone, by the same processors and with the same random
number as without drafts: the text, its log probabilities and the generator's state are the same, whatever was drafted. What a
grammar forces is drafted like all else, so a token that it leaves no choice about draws its random number too. Only where rows of
one pass have the bits of single rows (``Executor.takes_drafts``).
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from fate_moe.core import Drafts
from fate_moe.schedule.gate import Gate, Offer
from fate_moe.schedule.lookup import PromptLookup

__all__ = ["DEFAULT", "MODES", "SOURCES", "Assistant", "Draftable", "Drafter", "Mode", "Speculation", "Text"]

Mode: TypeAlias = Literal["auto", "off", "lookup", "assistant"]
MODES: tuple[Mode, ...] = ("auto", "off", "lookup", "assistant")
SOURCES = ("lookup", "grammar", "assistant")
DEFAULT: Mode = "off"  # where nobody says
_MOST = 8  # drafted tokens of a pass: with the one before them few enough for the kernels of few rows
_LONG = 8  # tokens of a match from which on its drafts are accepted alike
_RATE = 0.1  # of the mean of what a draft of the assistant costs


class Text(Protocol):
    """What a small model has read of a text."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """``most`` tokens that it would write behind ``tokens``, of which any may have changed since the last call."""


class Assistant(Protocol):
    """A small model that writes drafts."""

    def text(self) -> Text:
        """A text that it has read nothing of."""


class Drafter:
    """Drafts for one text."""

    def __init__(self, speculation: Speculation) -> None:
        mode, assistant = speculation.mode, speculation.assistant
        self._index = PromptLookup() if mode in ("auto", "lookup") else None
        self._text = assistant.text() if assistant is not None and mode in ("auto", "assistant") else None
        self.has_begun = False  # the small model has read the text's beginning

    def found(self, tokens: Sequence[int], room: int) -> tuple[list[int], int]:
        """At most ``room`` tokens that followed the same ones as end ``tokens``, and how many those are. ``tokens`` begin with
        those of the call before."""
        if self._index is None:
            return [], 0
        self._index.extend(tokens[len(self._index) :])
        return self._index.draft(room)

    @property
    def is_assisted(self) -> bool:
        """Whether a small model writes drafts."""
        return self._text is not None

    def written(self, tokens: Sequence[int], most: int) -> list[int]:
        """What the small model would write."""
        self.has_begun = True
        return self._text.draft(tokens, most) if self._text is not None and most else []


@dataclass(frozen=True)
class Draftable:
    """A text whose last token the next pass reads, with ``room`` for drafts. ``forced``: what has to follow."""

    drafter: Drafter
    tokens: Sequence[int]
    room: int
    forced: Sequence[int] = ()


class Speculation:
    """What is drafted for one model. ``auto``: what pays as measured (``Gate``), from any source. ``lookup``: all that is found in
    the text, ``assistant``: what the small model writes, up to ``most`` tokens for a text. What a grammar forces comes first.

    A pass that reads the last tokens of texts alone, and drafts, is told of by ``draft`` before it and ``passed`` behind it.
    ``counts``: where drafts are counted, a model's ``fate.drafts``.
    """

    def __init__(
        self, mode: Mode = "auto", most: int = _MOST, counts: Drafts | None = None, assistant: Assistant | None = None
    ) -> None:
        self.mode, self.most, self.assistant = mode, most, assistant
        self.most_forced = 2 * most - 1  # they are cheap to be sure of
        self.gate, self.counts = Gate(self.most_forced), counts or Drafts()
        self._written = 0.0  # seconds that a draft of the assistant takes
        self._began: float | None = None  # when the pass began that drafts were asked for
        self._drafting = 0.0
        self._kinds: list[Hashable] = []  # of the drafts of each text in the pass
        self._drafted: list[int] = []  # and how many there are

    def draft(self, texts: Sequence[Draftable]) -> list[list[int]]:
        """The tokens that the next pass reads behind each of ``texts``."""
        began = time.perf_counter()
        drafts, offers = list[list[int]](), list[Offer]()
        for text in texts:
            tokens, offer = self._offer(text)
            drafts.append(tokens)
            offers.append(offer)
        counts = self.gate.choose(offers) if self.mode == "auto" else [offer.tokens for offer in offers]
        for index, (text, offer, count) in enumerate(zip(texts, offers, counts, strict=True)):
            if offer.kind == "assistant" and count:
                asked, had_begun = time.perf_counter(), text.drafter.has_begun
                drafts[index] = text.drafter.written(text.tokens, count)
                if had_begun:  # the first draft reads the prompt too
                    seconds = (time.perf_counter() - asked) / count
                    self._written += (_RATE if self._written else 1.0) * (seconds - self._written)
            else:
                del drafts[index][count:]
        self._kinds, self._drafted = [offer.kind for offer in offers], [len(draft) for draft in drafts]
        self._began = time.perf_counter()
        self._drafting = self._began - began
        return drafts

    def _offer(self, text: Draftable) -> tuple[list[int], Offer]:
        """The best that there is for ``text``; the tokens of an assistant's offer are not yet written."""
        room, drafter = min(text.room, self.most), text.drafter
        found, matched = drafter.found(text.tokens, room)  # told of all tokens, whoever drafts
        if text.forced and text.room:
            forced = list(text.forced[: min(text.room, self.most_forced)])
            return forced, Offer(len(forced), "grammar")
        lookup = Offer(len(found), ("lookup", min(matched, _LONG)))
        if not drafter.is_assisted or not room:
            return found, lookup
        assistant = Offer(room, "assistant", self._written)
        if found and self.gate.better([lookup, assistant]) == 0:
            return found, lookup
        return [], assistant

    def passed(self, accepted: Sequence[int]) -> None:
        """Of each text's drafts the first ``accepted`` were kept. Of no effect where ``draft`` was not called."""
        if self._began is None:
            return
        seconds, self._began = time.perf_counter() - self._began, None
        for kind, drafted, right in zip(self._kinds, self._drafted, accepted, strict=True):
            self.counts.count(kind if isinstance(kind, str) else "lookup", drafted, right)
        self.gate.passed(seconds, self._drafted, accepted, self._kinds, self._drafting)
