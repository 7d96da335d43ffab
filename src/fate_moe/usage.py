"""How routers have chosen so far, and what that says of the next token. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_moe.errors import ConfigError

__all__ = ["CoActivation", "Usage"]

Floats = NDArray[np.float32]

# Means over the last 5, 20 and 100 tokens, added up. Found on gpt-oss-20b's mmlu_validation trace: the three close 35 / 37 / 36 /
# 30 % of the gap in misses from LRU to Belady at 12.5 / 25 / 40 / 50 % resident, the best single one (0.95) 32 / 33 / 32 / 27 %.
DECAYS = (0.8, 0.95, 0.99)
# Tokens from the experts that give evidence to those they speak for, and the evidence's weight (it is not independent, so it
# counts for less than Bayes' rule says). Next token alone, weight 0.15: 47 / 49 / 43 / 37 % of the gap; eight on alone does
# better at 40 % and above, both together are good everywhere.
LAGS = ((1, 0.12), (8, 0.07))
PRIOR = 0.5  # virtual observations of independence
FLOOR = 0.02
MAX_TABLE_BYTES = 8 << 20  # a usage whose tables would be larger (58 layers of 256 experts: 58 MiB) goes without evidence


class Usage:
    """Each expert's expected uses per token, ``worth`` [L, E], from how often it was used lately.

    A layer's row changes when the layer's router has spoken, so the rows of layers that are yet to come in this token count one
    decay less than those just passed: what is needed sooner is worth more. What single tokens chose is kept until somebody wants to
    know the worth, and settled for all layers at once: a dozen small operations of numpy take 150 us while weights go through the
    processor's caches, for one layer as for a token's 24.
    """

    def __init__(self, experts_per_layer: Sequence[int], *, co_activation: bool = True) -> None:
        num_layers, width = len(experts_per_layer), max(experts_per_layer)
        self._worth: Floats = np.zeros((num_layers, width), np.float32)
        self._recent: Floats = np.zeros((num_layers, width, len(DECAYS)), np.float32)
        self._decays: Floats = np.array(DECAYS, np.float32)
        self._gain: Floats = (1 - self._decays) / np.float32(len(DECAYS))
        self._ones: Floats = np.ones(len(DECAYS), np.float32)
        self._pending: list[tuple[int, Sequence[int]]] = []  # of one token, by ascending layer, with equally many experts
        fits = num_layers * width * width * 4 * 2 * len(LAGS) <= MAX_TABLE_BYTES
        self._evidence = CoActivation(num_layers, width) if co_activation and fits else None

    @property
    def worth(self) -> Floats:
        """Not to be written to."""
        if self._pending:
            self._settle()
        return self._worth

    def routed(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, num_tokens: int = 1) -> None:
        """``layer``'s router chose the distinct ``experts``, for ``counts`` of the ``num_tokens`` tokens (None: for all)."""
        pending = self._pending
        if pending and (num_tokens > 1 or layer <= pending[-1][0] or len(experts) != len(pending[0][1])):
            self._settle()
        if num_tokens == 1:
            self._pending.append((layer, experts))
            return
        # As if the tokens had come one by one, in equal proportions.
        recent = self._recent[layer]
        kept = self._decays**num_tokens
        recent *= kept
        share = np.asarray(counts if counts is not None else num_tokens, np.float32).reshape(-1, 1) / num_tokens
        recent[np.array(experts, np.intp)] += (1 - kept) / len(DECAYS) * share
        self._worth[layer] = recent.dot(self._ones)
        if self._evidence is not None:
            self._worth[layer] += self._evidence.interrupted(layer)

    def _settle(self) -> None:
        """Count what single tokens chose."""
        layers = np.array([layer for layer, _ in self._pending], np.intp)
        chosen = np.array([experts for _, experts in self._pending], np.intp)  # [n, k]
        self._pending = []
        recent = self._recent[layers]
        recent *= self._decays
        recent[np.arange(len(layers))[:, None], chosen] += self._gain
        self._recent[layers] = recent
        worth = recent.dot(self._ones)
        if self._evidence is not None:
            factor, floor = self._evidence.routed(layers, chosen)
            worth += floor
            worth *= factor
        self._worth[layers] = worth

    def state(self) -> dict[str, NDArray[Any]]:
        """What ``restore`` takes: arrays by name."""
        if self._pending:
            self._settle()
        return {"recent": self._recent} | (self._evidence.state() if self._evidence else {})

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from an earlier ``state``. Raises ConfigError, and changes nothing, if it is not one of this shape."""
        mine = self.state()
        for name, array in mine.items():
            other = state.get(name)
            if other is None or other.shape != array.shape or other.dtype != array.dtype or not np.isfinite(other).all():
                raise ConfigError(f"these routing statistics are of another model or damaged ({name}); they are not used")
            if (other < 0).any():
                raise ConfigError(f"these routing statistics are damaged ({name} is negative); they are not used")
        for name, array in mine.items():
            array[...] = state[name]
        self._recent.sum(2, out=self._worth)
        if self._evidence is not None:
            self._evidence.read()


class CoActivation:
    """Which experts of a layer follow which: counts of (expert at token t, expert at t + lag), read as naive Bayes' evidence.

    Learned once a token, for all layers in one go.
    """

    def __init__(self, num_layers: int, width: int) -> None:
        self._pairs: Floats = np.zeros((len(LAGS), num_layers, width, width), np.float32)
        self._from: Floats = np.zeros((len(LAGS), num_layers, width), np.float32)
        self._uses: Floats = np.zeros((num_layers, width), np.float32)
        self._tokens: Floats = np.zeros(1, np.float32)
        self._evidence: Floats = np.zeros((num_layers, width, len(LAGS), width), np.float32)  # weighted log ratios of the pairs
        self._floor: Floats = np.zeros((num_layers, width), np.float32)
        self._layers = np.arange(num_layers)[:, None]
        self._now: list[NDArray[np.intp]] = []
        self._past: deque[NDArray[np.intp]] = deque(maxlen=max(lag for lag, _ in LAGS))  # [L, k] each, the latest last

    def routed(self, layers: NDArray[np.intp], experts: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """``layers`` [n], ascending, chose ``experts`` [n, k] for one token.

        By how much they make each expert of these layers likelier than it is on average, [n, E], and a little of that average.
        """
        factor = np.exp(np.add.reduce(self._evidence[layers[:, None], experts], (1, 2)))
        floor = self._floor[layers]
        for row, layer in enumerate(layers.tolist()):
            if layer == 0:
                self._now = []
            if layer == len(self._now):
                self._now.append(experts[row])
            else:
                self.interrupted(layer)
                factor[row] = 1
        if len(self._now) == len(self._layers) and len({len(chosen) for chosen in self._now}) == 1:
            self._learn(np.stack(self._now))
            self._now = []
        return factor, floor

    def interrupted(self, layer: int) -> Floats:
        """``layer`` chose for many tokens, or what it chose for one is not known in order; a little of the average [E]."""
        self._now = []
        self._past.clear()
        return np.asarray(self._floor[layer], np.float32)

    def _learn(self, now: NDArray[np.intp]) -> None:
        layers = self._layers
        self._uses[layers, now] += 1
        self._tokens += 1
        average = self._average()
        np.multiply(average, FLOOR, out=self._floor)
        for index, (lag, weight) in enumerate(LAGS):
            if len(self._past) >= lag:
                then = self._past[-lag]
                self._pairs[index][layers[:, :, None], then[:, :, None], now[:, None, :]] += 1
                self._from[index][layers, then] += 1
                expected = average[:, None] * (self._from[index][layers, then] + PRIOR)[:, :, None]  # [L, k, E]
                found = self._pairs[index][layers, then] + PRIOR * average[:, None]
                self._evidence[layers, then, index] = weight * np.log(found / expected)
        self._past.append(now)

    def _average(self) -> Floats:
        return np.asarray((self._uses + 0.05) / (self._tokens + 1), np.float32)

    def read(self) -> None:
        """Let the evidence say what the counts say: they were restored."""
        average = self._average()
        np.multiply(average, FLOOR, out=self._floor)
        for index, (_, weight) in enumerate(LAGS):
            expected = average[:, None] * (self._from[index] + PRIOR)[:, :, None]
            self._evidence[:, :, index] = weight * np.log((self._pairs[index] + PRIOR * average[:, None]) / expected)

    def state(self) -> dict[str, NDArray[Any]]:
        """The counts, by name."""
        return {"pairs": self._pairs, "from": self._from, "uses": self._uses, "tokens": self._tokens}
