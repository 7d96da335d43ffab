"""How many drafted tokens to check in one pass: as many as pay, by what passes and drafts were measured to give. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

__all__ = ["Gate", "Offer"]

_RATE = 0.1  # of the moving means
_FEW = 4  # single passes that are timed before anything is drafted
_UNKNOWN, _BELIEF = 0.5, 2  # the chance of a first draft before one was checked, and as how many measurements it counts
_ALIKE = 3  # positions of a draft from here on are accepted alike: figures of far ones would grow old while fewer are drafted
_CLOSE = 0.05  # of a single pass's time: what a further row is taken to cost before passes of so many rows were timed
_OLD = 64  # passes after which a figure is believed half as much, by probes
_TRUSTED = 3  # timed passes of a number of rows that are believed; fewer count beside what was hoped for


@dataclass(frozen=True)
class Offer:
    """Up to ``tokens`` drafted tokens for one text, which cost ``seconds`` each. Those of one ``kind`` are accepted alike."""

    tokens: int
    kind: Hashable = None
    seconds: float = 0.0


@dataclass
class _Mean:
    """A mean that forgets: of the last ten measurements or so."""

    value: float = 0.0
    count: int = 0
    at: int = 0  # the last measurement

    def add(self, value: float, at: int = 0) -> None:
        self.count += 1
        self.at = at
        self.value += max(_RATE, 1 / self.count) * (value - self.value)


@dataclass
class _Kind:
    """Drafts of one kind: by position, how often a token is accepted if those before it were."""

    accepted: list[_Mean] = field(default_factory=list)

    def chance(self, position: int) -> float:
        position = min(position, _ALIKE - 1)
        if position < len(self.accepted):
            return self.accepted[position].value
        return self.last

    @property
    def last(self) -> float:
        """Of the furthest position that was seen."""
        return self.accepted[-1].value if self.accepted else _UNKNOWN


_UNSEEN = _Kind()


class Gate:
    """Chooses how many drafted tokens the next pass checks (never slower than not trying).

    A pass over n texts gives n tokens. With drafts it gives ``a1 + a1 a2 + ...`` more for each text, where ``a_j`` is the measured
    chance that draft j is accepted if those before it were. With m drafts in all it takes ``T(n, m)``, measured with the expert
    cache as it is: the reads are in it. So they are worth

        (n + sum over texts of (a1 + a1 a2 + ...)) / n * T(n, 0) / (T(n, m) + drafting)

    passes without drafts. Of the m drafts that are the likeliest to be accepted, the best m among 1, 2, 4, ... is taken if that is
    more than one, else none. Probes keep the figures fresh: another m is tried that would be the best if figures were forgotten
    with time, but only while all that probes have lost stays below ``allowance`` of the whole time. Passes that were never timed
    are taken to be as those of as many rows, or cheap, so that each is tried: a second row may double the experts of a pass, and a
    ninth add few.
    """

    def __init__(self, most: int = 8, allowance: float = 0.005) -> None:
        """``most`` drafted tokens for a text in a pass."""
        self.most = most
        self.probes = 0
        self._allowance = allowance
        self._seconds: dict[tuple[int, int], _Mean] = {}  # of a pass by its texts and drafts
        self._by_rows: dict[int, _Mean] = {}  # of all passes of so many rows
        self._kinds: dict[Hashable, _Kind] = {}
        self._total = self._lost = 0.0  # seconds of all passes; of these, what probes lost
        self._is_probe = False
        self._rate = 1.0  # what the pass would have been worth if it was no probe
        self._passes = 0

    def choose(self, offers: Sequence[Offer]) -> list[int]:
        """How many tokens of each of ``offers``, one a text, to check in the next pass."""
        self._is_probe = False
        counts, single = [0] * len(offers), self._seconds.get((len(offers), 0))
        if single is None or single.count < _FEW:
            return counts
        drafts = self._drafts(offers)
        if not drafts:
            return counts
        if len(offers) > 1:
            drafts.sort(key=lambda draft: -draft[0])
        best, worth, other, other_worth, other_gives, other_seconds, cost = 0, 1.0, 0, 0.0, 0.0, 0.0, 0.0
        expected = float(len(offers))
        for count, (chain, text) in enumerate(drafts, 1):
            expected += chain
            cost += offers[text].seconds
            if count & (count - 1) and count != self.most:  # few numbers of rows, so that each is timed soon
                continue
            gives, seconds = expected / len(offers) * single.value, self._pass_seconds(len(offers), count) + cost
            if gives / seconds > worth:
                best, worth = count, gives / seconds
            hoped = gives / (self._pass_seconds(len(offers), count, fresh=True) + cost)
            if hoped > other_worth:
                other, other_worth, other_gives, other_seconds = count, hoped, gives, seconds
        if other != best and (other_worth > worth or not best):
            risk = max(0.0, other_seconds - other_gives / worth)
            self._is_probe = self._lost + risk <= self._allowance * self._total
            if self._is_probe:
                best, self._rate = other, worth
        for _, text in drafts[:best]:
            counts[text] += 1
        return counts

    def better(self, offers: Sequence[Offer]) -> int:
        """Which of ``offers`` for one text gives the most."""

        def gives(offer: Offer) -> float:
            single, best, expected = self._seconds.get((1, 0), _Mean(1.0)).value, 1.0, 1.0
            for count, (chain, _) in enumerate(self._drafts([offer]), 1):
                expected += chain
                seconds = self._pass_seconds(1, count) if (1, 0) in self._seconds else single
                best = max(best, expected * single / (seconds + count * offer.seconds))
            return best

        return max(range(len(offers)), key=lambda index: gives(offers[index]))

    def passed(
        self,
        seconds: float,
        drafted: Sequence[int] = (0,),
        accepted: Sequence[int] = (0,),
        kinds: Sequence[Hashable] = (None,),
        drafting: float = 0.0,
    ) -> None:
        """A pass took ``seconds``, and making its drafts ``drafting``; of the ``drafted`` tokens of each text the first
        ``accepted`` were right."""
        texts, drafts = len(drafted), sum(drafted)
        self._passes += 1
        self._seconds.setdefault((texts, drafts), _Mean()).add(seconds, self._passes)
        self._by_rows.setdefault(texts + drafts, _Mean()).add(seconds)
        self._total += seconds + drafting
        for count, right, kind in zip(drafted, accepted, kinds, strict=True):
            if count:
                self._count(count, right, kind)
        if drafts and self._is_probe:
            self.probes += 1
            given = (texts + sum(accepted)) / texts
            self._lost += max(0.0, seconds + drafting - given * self._seconds[texts, 0].value / self._rate)

    def acceptance(self) -> list[float]:
        """By position, the share of drafts that are accepted if those before them were: the mean over the kinds seen. The last one
        is of all positions behind it too."""
        longest = max((len(kind.accepted) for kind in self._kinds.values()), default=0)
        by_position = [[kind.accepted[i] for kind in self._kinds.values() if i < len(kind.accepted)] for i in range(longest)]
        return [sum(mean.value * mean.count for mean in means) / sum(mean.count for mean in means) for means in by_position]

    def _count(self, drafted: int, accepted: int, kind: Hashable) -> None:
        means = self._kinds.setdefault(kind, _Kind()).accepted
        for position in range(min(accepted + 1, drafted)):
            at = min(position, _ALIKE - 1)
            if at == len(means):
                means.append(_Mean(means[-1].value if means else _UNKNOWN, _BELIEF))
            means[at].add(float(position < accepted))

    def _drafts(self, offers: Sequence[Offer]) -> list[tuple[float, int]]:
        """The chance that a draft and all before it are accepted, and its text."""
        found = list[tuple[float, int]]()
        for text, offer in enumerate(offers):
            if not offer.tokens:
                continue
            chain, chances = 1.0, self._kinds.get(offer.kind, _UNSEEN)
            for position in range(min(offer.tokens, self.most)):
                chain *= chances.chance(position) if position < _ALIKE else chances.last
                found.append((chain, text))
        return found

    def _pass_seconds(self, texts: int, drafts: int, fresh: bool = False) -> float:
        """Of a pass: as measured, or as hoped for. ``fresh``: what was measured long ago is forgotten by and by."""
        mean = self._seconds.get((texts, drafts))
        if mean is not None and mean.count >= _TRUSTED and not fresh:
            return mean.value
        single, alike = self._seconds[texts, 0].value, self._by_rows.get(texts + drafts)
        hoped = single * (1 + _CLOSE * drafts)
        if mean is None:
            return max(single, alike.value) if alike is not None and texts > 1 else hoped
        known = min(mean.count, _TRUSTED) * (0.5 ** ((self._passes - mean.at) / _OLD) if fresh else 1.0)
        return (known * mean.value + (_TRUSTED - known) * hoped) / _TRUSTED
