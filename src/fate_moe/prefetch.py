"""Reading ahead: when to ask the predictor, how much to read, and when to leave it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from fate_moe.core import Counters, ExpertId, Predictor
from fate_moe.predict.null import NoPrediction
from fate_moe.predict.rule import reads_worth

if TYPE_CHECKING:
    import torch

__all__ = ["Prefetcher", "Slots", "Trial"]

KEPT_FROM = 0.25  # a resident expert that is at least so likely is kept from prefetches until its layer has run


class Slots(Protocol):
    """What reading ahead wants of a residency, the real one or the simulator's."""

    counters: Counters
    read_seconds: float

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        """Queue reads of the first ``most`` of those ``expected`` that are missing; how many were queued."""

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        """Which of ``experts`` are neither resident nor in flight."""


class Trial:
    """Finds out whether reading ahead pays here: a few tokens with, a few without, then the better way (law 3).

    Each way is tried for ``BLOCK`` tokens until each has had ``FIRST``, and again every ``PERIOD`` tokens: what pays depends on
    what is resident by then. Reading ahead is kept if its tokens (medians of blocks, decayed) are no slower, and if predicting
    takes less time than there is to save: the stall of tokens without it, which is not blurred by what else the machine does.
    """

    BLOCK, FIRST, PERIOD = 4, 12, 128

    def __init__(self) -> None:
        self.reading_ahead = True
        self._seconds: dict[bool, float] = {}  # a token, by way
        self._stall = float("inf")  # a token's, without
        self._cost = 0.0  # of predicting for a token
        self._tokens = 0
        self._block: list[float] = []
        self._before = (0.0, 0.0, 0.0)  # now, stalled and spent as the last token began
        self._sums = [0.0, 0.0]

    def token(self, now: float, stalled: float = float("inf"), spent: float = 0.0) -> bool:
        """A decode step begins; whether to read ahead in it. ``stalled`` and ``spent`` on predicting are seconds so far, in all."""
        then, stalled_then, spent_then = self._before
        if then:
            self._block.append(now - then)
            self._sums[0] += stalled - stalled_then if stalled < float("inf") else float("inf")
            self._sums[1] += spent - spent_then
        self._before = (now, stalled, spent)
        if len(self._block) >= self.BLOCK:
            self._judge()
        return self.reading_ahead

    def pause(self) -> None:
        """What follows is not comparable: a prompt is read, or time has passed."""
        self._before = (0.0, 0.0, 0.0)
        self._block, self._sums = [], [0.0, 0.0]

    def _judge(self) -> None:
        typical, count, way = sorted(self._block)[len(self._block) // 2], len(self._block), self.reading_ahead
        known = self._seconds.get(way, typical)
        self._seconds[way] = known + 0.5 * (typical - known)
        if way:
            self._cost = self._sums[1] / count
        else:
            self._stall = self._sums[0] / count
        self._block, self._sums = [], [0.0, 0.0]
        self._tokens += count
        if self._tokens <= 2 * self.FIRST or self._tokens % self.PERIOD < self.BLOCK:
            self.reading_ahead = not way
        else:
            no_slower = self._seconds.get(True, 0.0) <= self._seconds.get(False, float("inf"))
            self.reading_ahead = no_slower and self._cost < self._stall


class Prefetcher:
    """Asks the predictor about the next layer and queues what is worth its read. Called by the inference thread."""

    def __init__(
        self, residency: Slots, predictor: Predictor, num_layers: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.predictor = predictor
        self.idle = isinstance(predictor, NoPrediction)
        self.predicted: dict[int, list[tuple[int, float]]] = {}  # what was said of each layer last
        self._clock = clock
        self._residency = residency
        self._num_layers = num_layers
        self._trial = Trial() if predictor.calibrated and not self.idle else None
        self._reading_ahead = not self.idle
        self._spent = 0.0  # seconds on predicting and queueing
        self._entered: tuple[int, float, float] | None = None  # layer, time and stall so far when the last block was entered
        self._layer_seconds: dict[int, float] = {}  # by the power of two of the number of tokens: one block's time without stalls

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A forward pass begins on these tokens' ``embeddings`` [num_tokens, hidden]."""
        if self._trial is not None:
            if embeddings.shape[0] == 1:
                self._reading_ahead = self._trial.token(self._clock(), self._residency.counters.stall_seconds, self._spent)
            else:
                self._trial.pause()
                self._reading_ahead = True
        self._entered = None
        self._read(0, embeddings)

    def entered(self, layer: int, num_tokens: int) -> None:
        """Block ``layer`` is about to run: learn how long one block takes without its stalls."""
        now, stalled = self._clock(), self._residency.counters.stall_seconds
        if self._entered is not None and self._entered[0] == layer - 1:
            spent = (now - self._entered[1]) - (stalled - self._entered[2])
            bucket = num_tokens.bit_length()
            known = self._layer_seconds.get(bucket, spent)
            self._layer_seconds[bucket] = known + 0.1 * (spent - known)
        self._entered = (layer, now, stalled)

    def look_ahead(self, layer: int, gate_input: torch.Tensor) -> None:
        """The reads of ``layer`` are under way: queue those of the next one, from ``gate_input`` [num_tokens, hidden]."""
        if layer + 1 < self._num_layers:
            self._read(layer + 1, gate_input)

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        """``layer``'s router has spoken."""
        if not self.idle:
            began = self._clock()
            self.predictor.observe(layer, routed)
            self._spent += self._clock() - began

    def affordable(self, num_tokens: int) -> float:
        """How many experts can be read while one block computes ``num_tokens`` tokens; 0.0 before that is known."""
        window, read_seconds = self._layer_seconds.get(num_tokens.bit_length(), 0.0), self._residency.read_seconds
        return window / read_seconds if read_seconds else 0.0

    def _read(self, layer: int, gate_input: torch.Tensor) -> None:
        if not self._reading_ahead:
            self.predicted.pop(layer, None)
            return
        began = self._clock()
        self._predict(layer, gate_input)
        self._spent += self._clock() - began

    def _predict(self, layer: int, gate_input: torch.Tensor) -> None:
        predicted = self.predicted[layer] = self.predictor.predict(layer, gate_input)
        if not predicted:
            return
        window = self._layer_seconds.get(gate_input.shape[0].bit_length(), 0.0)
        read_seconds = self._residency.read_seconds
        if not self.predictor.calibrated:  # one after another: reads share the link and the cores
            fitting = int(self.affordable(len(gate_input)))
            self._residency.prefetch([ExpertId(layer, expert) for expert, _ in predicted], max(1, fitting))
            return
        experts = [ExpertId(layer, expert) for expert, _ in predicted]
        missing = self._residency.missing(experts)
        chances = [probability for (_, probability), absent in zip(predicted, missing, strict=True) if absent]
        most = reads_worth(chances, window, read_seconds) if read_seconds else 1
        likely = [
            (expert, probability)
            for expert, (_, probability), absent in zip(experts, predicted, missing, strict=True)
            if absent or probability >= KEPT_FROM
        ]
        self._residency.prefetch([expert for expert, _ in likely], most, [probability for _, probability in likely])
