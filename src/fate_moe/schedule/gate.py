"""How many drafted tokens to check in one pass: as many as pay, by what passes and drafts were measured to give. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

__all__ = ["Gate"]

_RATE = 0.1  # of the moving means
_FEW = 4  # single passes that are timed before anything is drafted
_UNKNOWN, _BELIEF = 0.5, 2  # the chance of a first draft before one was checked, and as how many measurements it counts
_ALIKE = 3  # positions of a draft from here on are accepted alike: figures of far ones would grow old while fewer are drafted
_CLOSE = 0.05  # of a single pass's time: what a further row is taken to cost before passes of so many rows were timed
_TRUSTED = 3  # timed passes of a number of rows that are believed; fewer count beside what was hoped for


@dataclass
class _Mean:
    """A mean that forgets: of the last ten measurements or so."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(_RATE, 1 / self.count) * (value - self.value)


@dataclass
class _Kind:
    """Drafts of one kind: by position, how often a token is accepted if those before it were."""

    accepted: list[_Mean] = field(default_factory=list)

    def chance(self, position: int) -> float:
        position = min(position, _ALIKE - 1)
        if position < len(self.accepted):
            return self.accepted[position].value
        return self.accepted[-1].value if self.accepted else _UNKNOWN


class Gate:
    """Chooses the number k of drafted tokens for the next pass (never slower than not trying).

    A pass of k + 1 rows gives ``1 + a1 + a1 a2 + ...`` tokens on average, where ``a_j`` is the measured chance that draft j is
    accepted if those before it were, and takes ``T(k + 1)``, measured with the expert cache as it is: the reads are in it. So k
    drafts are worth

        (1 + a1 + a1 a2 + ...) * T(1) / (T(k + 1) + drafting)

    single passes. The best k among 1, 2, 4, ... is taken if that is more than one. Else nothing is drafted, but for probes that
    keep the figures fresh: one is made only while all that probes have lost stays below ``allowance`` of the whole time. Numbers of
    rows that were never timed are taken to be cheap, so that each is tried: a second row may double the experts of a pass, and a
    ninth add few.
    """

    def __init__(self, most: int = 8, allowance: float = 0.005) -> None:
        """``most`` drafted tokens in a pass."""
        self.most = most
        self.probes = 0
        self._allowance = allowance
        self._seconds: dict[int, _Mean] = {}  # of a pass by its rows
        self._kinds: dict[Hashable, _Kind] = {}
        self._total = self._lost = 0.0  # seconds of all passes; of these, what probes lost
        self._is_probe = False

    def choose(self, available: int, kind: Hashable = None, draft_seconds: float = 0.0) -> int:
        """How many of ``available`` drafted tokens to check in the next pass. ``kind``: those of one kind are accepted alike;
        ``draft_seconds``: what each has cost or will."""
        self._is_probe = False
        single = self._seconds.get(1)
        if single is None or single.count < _FEW or available < 1:
            return 0
        chances, best, worth = self._kinds.setdefault(kind, _Kind()), 0, 0.0
        expected, chain = 1.0, 1.0
        for count in range(1, min(available, self.most) + 1):
            chain *= chances.chance(count - 1)
            expected += chain
            if count & (count - 1) and count != self.most:  # few numbers of rows, so that each is timed soon
                continue
            value = expected * single.value / (self._pass_seconds(count + 1) + count * draft_seconds)
            if value > worth:
                best, worth = count, value
        if worth > 1.0:
            return best
        risk = self._pass_seconds(best + 1) + best * draft_seconds - single.value
        self._is_probe = self._lost + risk <= self._allowance * self._total
        return best if self._is_probe else 0

    def passed(self, seconds: float, drafted: int = 0, accepted: int = 0, kind: Hashable = None) -> None:
        """A pass of ``drafted + 1`` rows took ``seconds``, drafting included; the first ``accepted`` drafts were right."""
        self._seconds.setdefault(drafted + 1, _Mean()).add(seconds)
        self._total += seconds
        if not drafted:
            return
        means = self._kinds.setdefault(kind, _Kind()).accepted
        for position in range(min(accepted + 1, drafted)):
            at = min(position, _ALIKE - 1)
            if at == len(means):
                means.append(_Mean(means[-1].value if means else _UNKNOWN, _BELIEF))
            means[at].add(float(position < accepted))
        if self._is_probe:
            self.probes += 1
            self._lost += max(0.0, seconds - (1 + accepted) * self._seconds[1].value)

    def acceptance(self) -> list[float]:
        """By position, the share of drafts that are accepted if those before them were: the mean over the kinds seen. The last one
        is of all positions behind it too."""
        longest = max((len(kind.accepted) for kind in self._kinds.values()), default=0)
        by_position = [[kind.accepted[i] for kind in self._kinds.values() if i < len(kind.accepted)] for i in range(longest)]
        return [sum(mean.value * mean.count for mean in means) / sum(mean.count for mean in means) for means in by_position]

    def _pass_seconds(self, rows: int) -> float:
        """Of a pass of ``rows``: as measured, or as hoped for."""
        single, mean = self._seconds[1].value, self._seconds.get(rows, _Mean())
        hoped = single * (1 + _CLOSE * (rows - 1))
        known = min(mean.count, _TRUSTED)
        return (known * mean.value + (_TRUSTED - known) * hoped) / _TRUSTED
