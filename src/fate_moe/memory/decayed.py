"""The default: what is expected to be used least per token goes first. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_moe.core import EvictionPolicy, ExpertId
from fate_moe.memory.statistics import RoutingStatistics

__all__ = ["Decayed"]


class Decayed(EvictionPolicy):
    """Decayed frequency over several horizons, in one pool over all layers; with ``co_activation`` also what the last token says.

    An expert that is read once for a rare token has a low value and is the next victim: it passes through one slot and displaces
    nothing good (bypass). A prefetch gets no slot from an expert that is likelier to be used than what it brings (admission
    margin). The statistics outlive residency; ``state`` and ``restore`` carry it from one run to the next.
    """

    def __init__(self, experts_per_layer: Sequence[int], *, co_activation: bool = True) -> None:
        self.statistics = RoutingStatistics(experts_per_layer, co_activation=co_activation)
        self._absent = np.full(self.statistics.expected_uses.shape, np.inf, np.float32)  # 0 where an expert has a slot
        self._held = self._absent.copy()  # value where an expert has a slot, else infinite
        self._flat = self._held.reshape(-1)
        self._outdated = False  # ``held`` is, by what was routed since
        self._width = max(experts_per_layer)

    def routed(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, num_tokens: int = 1) -> None:
        self.statistics.routed(layer, experts, counts, num_tokens)
        self._outdated = True

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._absent[expert] = 0
        if not self._outdated:
            self._held[expert] = self.statistics.value[expert]

    def touched(self, expert: ExpertId) -> None:
        pass

    def removed(self, expert: ExpertId) -> None:
        self._absent[expert] = self._held[expert] = np.inf

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        if self._outdated:
            np.add(self.statistics.value, self._absent, out=self._held)
            self._outdated = False
        flat, passed_over = self._flat, []
        while True:
            index = int(flat.argmin())
            value = flat[index]
            chosen = None if value == np.inf else ExpertId(*divmod(index, self._width))
            if chosen is None or evictable(chosen):
                break
            passed_over.append((index, value))
            flat[index] = np.inf
        for index, found in passed_over:
            flat[index] = found
        return None if probability < 1 and value >= probability else chosen

    def hottest(self, most: int) -> list[ExpertId]:
        """Up to ``most`` experts that are expected to be used at all, most expected first."""
        expected = self.statistics.expected_uses.reshape(-1)
        order = np.argsort(-expected, kind="stable")[:most]
        return [ExpertId(*divmod(int(index), self._width)) for index in order if expected[index] > 0]

    def state(self) -> dict[str, NDArray[Any]]:
        """What was learned, as arrays by name."""
        return self.statistics.state()

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from an earlier run's ``state``. Raises ConfigError if it does not fit, and changes nothing then."""
        self.statistics.restore(state)
        self._outdated = True
