"""Reading ahead: when to ask the predictor, how much to read, and when to leave it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from fate_moe.core import Counters, ExpertId, Predictor
from fate_moe.predict.null import NoPrediction
from fate_moe.predict.rule import WASTE, num_reads

if TYPE_CHECKING:
    import torch

__all__ = ["Prefetcher", "Slots", "Trial"]

MOST_MISSING = 8  # experts: further layers are asked about where so many reads take longer than the layers in between
KEPT_FROM = 0.25  # a resident expert that is at least so likely is kept from prefetches until its layer has run


class Slots(Protocol):
    """What reading ahead wants of a residency, the real one or the simulator's."""

    counters: Counters
    read_seconds: float

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        """Queue reads of the first ``most`` of those ``expected`` that are missing; how many were queued."""

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        """Which of ``experts`` are neither resident nor in flight."""

    def cancel_prefetches(self) -> None:
        """Forget the prefetches that have not begun."""


class Trial:
    """Finds out whether reading ahead pays here: a few tokens with, a few without, then the better way (law 3).

    What counts is the time lost in a token: waited for reads, spent on predicting, and what reads that nobody used cost others.
    That is far less noisy than the token's whole time, which also must not be longer (medians of blocks, decayed): what the
    machine does besides would otherwise decide. Blocks of ``BLOCK`` tokens, ``FIRST`` tokens of each way, then a block of the other
    way again and again: soon at first, when slots still fill, every ``PERIOD`` tokens later. While less is lost without reading
    ahead than predicting alone takes, reading ahead cannot win, and is not tried.
    """

    BLOCK, FIRST, PERIOD = 4, 12, 128

    def __init__(self) -> None:
        self.reading_ahead = True
        self._seconds: dict[bool, float] = {}  # a token, by way
        self._lost: dict[bool, float] = {}  # of it, by way; infinite where it is not known
        self._judged: dict[bool, int] = {}  # at which token, by way
        self._price = 0.0  # seconds that predicting takes, a token
        self._tokens = 0
        self._blocks_to_try = 2 * self.FIRST // self.BLOCK - 1
        self._next = 4 * self.FIRST  # tokens after which the other way is tried again
        self._block: list[float] = []
        self._before = (0.0, 0.0, 0.0)  # now, lost and spent as the last token began
        self._sum = self._predicting = 0.0

    def token(self, now: float, lost: float = float("inf"), spent: float = 0.0) -> bool:
        """A decode step begins; whether to read ahead in it. ``lost``: seconds lost so far, in all; ``spent``: on predicting."""
        then, lost_then, spent_then = self._before
        if then:
            self._block.append(now - then)
            self._sum += lost - lost_then if lost < float("inf") else lost
            self._predicting += spent - spent_then
        self._before = (now, lost, spent)
        if len(self._block) >= self.BLOCK:
            self._judge()
        return self.reading_ahead

    def pause(self) -> None:
        """What follows is not comparable: a prompt is read, or time has passed."""
        self._before = (0.0, 0.0, 0.0)
        self._block, self._sum, self._predicting = [], 0.0, 0.0

    def _judge(self) -> None:
        way, count = self.reading_ahead, len(self._block)
        self._tokens += count
        recent = self._tokens - self._judged.get(way, 0) <= 3 * self.BLOCK  # else what is known may not be so any more
        self._judged[way] = self._tokens
        for known, found in ((self._seconds, sorted(self._block)[count // 2]), (self._lost, self._sum / count)):
            blend = recent and way in known and found < float("inf")
            known[way] = known[way] + 0.5 * (found - known[way]) if blend else found
        if way:
            self._price = self._predicting / count
        self._block, self._sum, self._predicting = [], 0.0, 0.0
        if self._lost.get(False, float("inf")) < self._price:
            self._blocks_to_try, self.reading_ahead = 0, False
            self._next = max(self._next, self._tokens + self.BLOCK)
            return
        if self._blocks_to_try:
            self._blocks_to_try -= 1
            self.reading_ahead = not way
            return
        loses_less = self._lost[True] < self._lost[False] or self._lost[False] == float("inf")
        self.reading_ahead = loses_less and self._seconds[True] <= self._seconds[False]
        if self._tokens >= self._next:
            self._next = self._tokens + min(self._tokens, self.PERIOD)
            self.reading_ahead = not self.reading_ahead


class Prefetcher:
    """Asks the predictor about the next layers and queues what is worth its read, nearer layers first. One thread calls it."""

    def __init__(
        self,
        residency: Slots,
        predictor: Predictor,
        num_layers: int,
        clock: Callable[[], float] = time.perf_counter,
        look_ahead: int = 1,
    ) -> None:
        self.predictor = predictor
        self.idle = isinstance(predictor, NoPrediction)
        self.predicted: dict[int, list[tuple[int, float]]] = {}  # what was said of each layer last
        self._clock = clock
        self._residency = residency
        self._num_layers = num_layers
        self._furthest = look_ahead
        self._trial = Trial() if predictor.gives_probabilities and not self.idle else None
        self._reading_ahead = not self.idle
        self._wasted = (0, 0.0)  # reads ahead that nobody used (yet), and the seconds that they cost others
        self._entered: tuple[int, float, float] | None = None  # layer, time and stall so far when the last block was entered
        self._layer_seconds: dict[int, float] = {}  # by the power of two of the number of tokens: one block's time without stalls

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A forward pass begins on these tokens' ``embeddings`` [num_tokens, hidden]."""
        if self._trial is not None:
            if embeddings.shape[0] == 1:
                self._reading_ahead = self._trial.token(self._clock(), self._lost(), self._residency.counters.predicting_seconds)
            else:
                self._trial.pause()
                self._reading_ahead = True
        self._entered = None
        self.predicted.clear()
        if self._reading_ahead:
            self._read(-1, embeddings)

    def _lost(self) -> float:
        """Seconds so far: waited, spent on predicting, and wasted on the link."""
        counters = self._residency.counters
        unused, (known, wasted) = counters.prefetched - counters.prefetch_used, self._wasted
        self._wasted = (unused, wasted + WASTE * self._residency.read_seconds * max(0, unused - known))
        return counters.stall_seconds + counters.predicting_seconds + self._wasted[1]

    def entered(self, layer: int, num_tokens: int) -> None:
        """Block ``layer`` is about to run: learn how long one block takes without its stalls."""
        now, stalled = self._clock(), self._residency.counters.stall_seconds
        if self._entered is not None and self._entered[0] == layer - 1:
            spent = (now - self._entered[1]) - (stalled - self._entered[2])
            bucket = num_tokens.bit_length()
            known = self._layer_seconds.get(bucket, spent)
            self._layer_seconds[bucket] = known + 0.1 * (spent - known)
        self._entered = (layer, now, stalled)

    def look_ahead(self, layer: int, router_input: torch.Tensor) -> None:
        """The reads of ``layer`` are under way: queue those of the next ones, from ``router_input`` [num_tokens, hidden]."""
        if self._reading_ahead and layer + 1 < self._num_layers:
            self._read(layer, router_input)

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        """``layer``'s router has spoken. The predictor is told only where it is asked: both took 2 % of a token."""
        if self._reading_ahead:
            began = self._clock()
            self.predictor.observe(layer, routed)
            self._residency.counters.predicting_seconds += self._clock() - began

    def affordable(self, num_tokens: int) -> float:
        """How many experts can be read while one block computes ``num_tokens`` tokens; 0.0 before that is known."""
        window, read_seconds = self._layer_seconds.get(num_tokens.bit_length(), 0.0), self._residency.read_seconds
        return window / read_seconds if read_seconds else 0.0

    def _read(self, layer: int, router_input: torch.Tensor) -> None:
        began = self._clock()
        if self._furthest > 1:
            self._residency.cancel_prefetches()  # what is known now is better than what queued them
        queued = self._predict(layer + 1, router_input, 1, 0)
        for ahead in range(2, min(self._furthest, self._num_layers - 1 - layer) + 1):
            queued += self._predict(layer + ahead, router_input, ahead, queued)
        self._residency.counters.predicting_seconds += self._clock() - began

    def _predict(self, layer: int, router_input: torch.Tensor, ahead: int, queued: int) -> int:
        """Queue reads of ``layer`` behind ``queued`` others; how many."""
        layer_seconds = self._layer_seconds.get(router_input.shape[0].bit_length(), 0.0)
        read_seconds = self._residency.read_seconds
        if ahead > 1 and not (ahead - 1) * layer_seconds < MOST_MISSING * read_seconds:
            return 0  # one layer later is soon enough
        predicted = self.predicted[layer] = self.predictor.predict(layer, router_input, ahead)
        if not predicted:
            return 0
        experts = [ExpertId(layer, expert) for expert, _ in predicted]
        if not self.predictor.gives_probabilities:  # one after another: reads share the link and the cores
            fitting = int(ahead * self.affordable(len(router_input))) - queued
            if ahead > 1 and fitting < 1:
                return 0
            return self._residency.prefetch(experts, max(1, fitting))
        missing = self._residency.missing(experts)
        chances = [probability for (_, probability), absent in zip(predicted, missing, strict=True) if absent]
        most = int(ahead == 1)  # before a read's time is known
        if read_seconds:
            most = num_reads(chances, layer_seconds, read_seconds, ahead=ahead, queued=queued)
        likely = [
            (expert, probability)
            for expert, (_, probability), absent in zip(experts, predicted, missing, strict=True)
            if absent or probability >= KEPT_FROM
        ]
        return self._residency.prefetch([expert for expert, _ in likely], most, [probability for _, probability in likely])
