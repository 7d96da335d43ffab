"""Prefetching: when to ask the predictor, how much to read, and when to do neither."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fate_moe.core import Counters, ExpertId, Predictor
from fate_moe.predict.null import NoPrediction
from fate_moe.predict.rule import WASTE, num_reads

if TYPE_CHECKING:
    import torch

__all__ = ["Prefetcher", "Slots", "Trial"]

MAX_MISSING = 8  # experts: a further layer is predicted now only if reading so many takes longer than the layers in between
MOST_ROWS = 16  # a pass of more tokens reads a prompt; of fewer, it is a step of one text with drafts, or of several texts
PROTECTED_FROM = 0.25  # a resident expert with this probability or more is protected from prefetches until its layer has run


class Slots(Protocol):
    """The part of a residency that prefetching uses: the real one or the simulator's."""

    counters: Counters
    read_seconds: float

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        """Queue reads of the first ``most`` of those ``expected`` that are missing; how many were queued."""

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        """Which of ``experts`` are neither resident nor in flight."""

    def cancel_prefetches(self) -> None:
        """Forget the prefetches that have not begun."""

    @property
    def holds_all(self) -> bool:
        """Whether each expert has a slot."""


class Trial:
    """Measures whether prefetching pays here: a few tokens with, a few without, then the better way (never slower than not trying).

    A way's cost is the time lost in a token: waiting for reads, predicting, and the link time of reads that were never used. That
    is far less noisy than the token's whole time, which must not be longer either (medians of blocks, decayed). Both ways run for
    ``FIRST`` tokens, in turns of ``BLOCK`` tokens. Then the better one runs, and the other is measured again for a block: soon at
    first, while slots still fill, every ``PERIOD`` tokens later. While less is lost without prefetching than predicting alone
    takes, prefetching cannot win and is not measured.
    """

    BLOCK, FIRST, PERIOD = 4, 12, 128

    def __init__(self) -> None:
        self.prefetching = True
        self._seconds: dict[bool, float] = {}  # per token, with and without prefetching
        self._lost: dict[bool, float] = {}  # of these, those that were lost; infinite where that is not known
        self._measured_at: dict[bool, int] = {}  # the token
        self._predicting_seconds = 0.0  # per token
        self._tokens = 0
        self._blocks_to_try = 2 * self.FIRST // self.BLOCK - 1
        self._next = 4 * self.FIRST  # tokens after which the other way is measured again
        self._block: list[float] = []  # seconds of its tokens
        self._last = (0.0, 0.0, 0.0)  # the arguments of ``token`` as the last token began
        self._lost_in_block = self._predicting_in_block = 0.0

    def token(self, now: float, lost: float = float("inf"), predicting: float = 0.0) -> bool:
        """A decode step begins; whether to prefetch in it. ``lost`` and ``predicting``: total seconds until ``now``."""
        then, lost_then, predicting_then = self._last
        if then:
            self._block.append(now - then)
            self._lost_in_block += lost - lost_then if lost < float("inf") else lost
            self._predicting_in_block += predicting - predicting_then
        self._last = (now, lost, predicting)
        if len(self._block) >= self.BLOCK:
            self._decide()
        return self.prefetching

    def leave(self, now: float, lost: float = float("inf"), predicting: float = 0.0) -> None:
        """A step of another kind begins: what was measured so far stays."""
        if self._last[0]:
            self.token(now, lost, predicting)
            self._last = (0.0, 0.0, 0.0)

    def pause(self) -> None:
        """What follows is not comparable: a prompt is read, or time has passed."""
        self._last = (0.0, 0.0, 0.0)
        self._clear_block()

    def _clear_block(self) -> None:
        self._block, self._lost_in_block, self._predicting_in_block = [], 0.0, 0.0

    def _decide(self) -> None:
        """A block is complete: choose how the next one runs."""
        way, count = self.prefetching, len(self._block)
        self._tokens += count
        recent = self._tokens - self._measured_at.get(way, 0) <= 3 * self.BLOCK  # older measurements are replaced, not blended
        self._measured_at[way] = self._tokens
        for known, found in ((self._seconds, sorted(self._block)[count // 2]), (self._lost, self._lost_in_block / count)):
            blend = recent and way in known and found < float("inf")
            known[way] = known[way] + 0.5 * (found - known[way]) if blend else found
        if way:
            self._predicting_seconds = self._predicting_in_block / count
        self._clear_block()
        if self._lost.get(False, float("inf")) < self._predicting_seconds:
            self._blocks_to_try, self.prefetching = 0, False
            self._next = max(self._next, self._tokens + self.BLOCK)
            return
        if self._blocks_to_try:
            self._blocks_to_try -= 1
            self.prefetching = not way
            return
        loses_less = self._lost[True] < self._lost[False] or self._lost[False] == float("inf")
        self.prefetching = loses_less and self._seconds[True] <= self._seconds[False]
        if self._tokens >= self._next:
            self._next = self._tokens + min(self._tokens, self.PERIOD)
            self.prefetching = not self.prefetching


class Prefetcher:
    """Predicts the next layers' experts and queues the reads that pay, nearer layers first. Called from one thread.

    ``native``: what a step in C++ uses instead (native_prefetcher.py).
    """

    native: Any = None

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
        self.predicted: dict[int, list[tuple[int, float]]] = {}  # by layer, the last prediction in this pass
        self._clock = clock
        self._residency = residency
        self._num_layers = num_layers
        self._furthest = look_ahead
        self._trials: dict[int, Trial] | None = {} if predictor.gives_probabilities and not self.idle else None
        # Of the pass that has begun. Passes are told apart by num_tokens.bit_length(), so that alike ones are compared.
        self._trial: Trial | None = None
        self._prefetching = not self.idle
        self._preloading = False
        self._wasted = (0, 0.0)  # prefetches that were not used (yet), and the seconds that they cost other reads
        self._entered: tuple[int, float, float] | None = None  # the last layer, and the time and total stall as it was entered
        self._layer_seconds: dict[int, float] = {}  # by num_tokens.bit_length(): one layer's time without stalls

    def preload(self, experts: Sequence[ExpertId]) -> None:
        """Queue reads of ``experts``, in their order, until the first pass begins: nothing else wants the link."""
        self._preloading = True
        self._residency.prefetch(experts)

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A forward pass begins on these tokens' ``embeddings`` [num_tokens, hidden]."""
        if self._preloading:
            self._preloading = False
            self._residency.cancel_prefetches()
        if self._residency.holds_all:
            self._prefetching = False
            if self._trial is not None:
                self._trial.pause()
        elif self._trials is not None:
            self._prefetching = self._tried(embeddings.shape[0], self._trials)
        else:
            self._prefetching = not self.idle
        self._begin()
        if self._prefetching:
            self._read(-1, embeddings)

    def _tried(self, num_tokens: int, trials: dict[int, Trial]) -> bool:
        """Whether to prefetch in a pass of ``num_tokens`` that begins, by what was measured in those that are alike."""
        before, self._trial = self._trial, trials.setdefault(num_tokens.bit_length(), Trial()) if num_tokens <= MOST_ROWS else None
        moment = self._clock(), self._lost(), self._residency.counters.predicting_seconds
        if before is not None and before is not self._trial:
            before.leave(*moment) if self._trial is not None else before.pause()
        return self._trial.token(*moment) if self._trial is not None else True

    def _begin(self) -> None:
        """Nothing is known of this pass."""
        self._entered = None
        self.predicted.clear()

    @property
    def prefetching(self) -> bool:
        """Whether the pass that has begun predicts."""
        return self._prefetching

    def _lost(self) -> float:
        """Total seconds: stalls, predicting, and link time of unused prefetches."""
        counters = self._residency.counters
        unused, (known, wasted) = counters.prefetched - counters.prefetch_used, self._wasted
        self._wasted = (unused, wasted + WASTE * self._residency.read_seconds * max(0, unused - known))
        return counters.stall_seconds + counters.predicting_seconds + self._wasted[1]

    def entered(self, layer: int, num_tokens: int) -> None:
        """``layer`` is about to run: measure how long one layer takes without its stalls."""
        now, stalled = self._clock(), self._residency.counters.stall_seconds
        if self._entered is not None and self._entered[0] == layer - 1:
            spent = (now - self._entered[1]) - (stalled - self._entered[2])
            bucket = num_tokens.bit_length()
            known = self._layer_seconds.get(bucket, spent)
            self._layer_seconds[bucket] = known + 0.1 * (spent - known)
        self._entered = (layer, now, stalled)

    def look_ahead(self, layer: int, router_input: torch.Tensor) -> None:
        """The reads of ``layer`` have been queued: queue those of the next layers, from ``router_input`` [num_tokens, hidden]."""
        if self._prefetching and layer + 1 < self._num_layers:
            self._read(layer, router_input)

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        """``layer`` chose the experts ``routed``. The predictor learns this only in passes in which it predicts: both take time."""
        if self._prefetching:
            began = self._clock()
            self.predictor.observe(layer, routed)
            self._residency.counters.predicting_seconds += self._clock() - began

    def layer_seconds(self, num_tokens: int) -> float:
        """One layer's time for ``num_tokens`` tokens without its stalls; 0.0 before it is known."""
        return self._layer_seconds.get(num_tokens.bit_length(), 0.0)

    def prediction_of(self, layer: int) -> Sequence[tuple[int, float]]:
        """The last prediction of ``layer`` in this pass."""
        return self.predicted.get(layer, ())

    def affordable(self, num_tokens: int) -> float:
        """How many experts can be read while one layer computes ``num_tokens`` tokens; 0.0 before that is known."""
        window, read_seconds = self.layer_seconds(num_tokens), self._residency.read_seconds
        return window / read_seconds if read_seconds else 0.0

    def _read(self, layer: int, router_input: torch.Tensor) -> None:
        began = self._clock()
        if self._furthest > 1:
            self._residency.cancel_prefetches()  # nearer layers are predicted better, so queue them anew
        queued = self._predict(layer + 1, router_input, 1, 0)
        for ahead in range(2, min(self._furthest, self._num_layers - 1 - layer) + 1):
            queued += self._predict(layer + ahead, router_input, ahead, queued)
        self._residency.counters.predicting_seconds += self._clock() - began

    def _predict(self, layer: int, router_input: torch.Tensor, ahead: int, queued: int) -> int:
        """Queue reads of ``layer`` behind ``queued`` others; how many."""
        layer_seconds = self.layer_seconds(len(router_input))
        read_seconds = self._residency.read_seconds
        if ahead > 1 and not (ahead - 1) * layer_seconds < MAX_MISSING * read_seconds:
            return 0  # predicting it one layer later is early enough
        predicted = self.predicted[layer] = self.predictor.predict(layer, router_input, ahead)
        if not predicted:
            return 0
        experts = [ExpertId(layer, expert) for expert, _ in predicted]
        if not self.predictor.gives_probabilities:  # as many as can be read in time: reads share the link and the cores
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
            if absent or probability >= PROTECTED_FROM
        ]
        return self._residency.prefetch([expert for expert, _ in likely], most, [probability for _, probability in likely])
