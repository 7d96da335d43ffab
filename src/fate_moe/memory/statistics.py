"""How routers have chosen so far, and what that predicts of the next token. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_moe.errors import ConfigError
from fate_moe.kernels.extension import native as extension

# The C++ class that counts turns; None where the extension is not built, or is older than the class.
native: Any = getattr(extension, "RoutingStatistics", None)

__all__ = ["CoActivation", "RoutingStatistics"]

Floats = NDArray[np.float32]

# Means over the last 5, 20 and 100 tokens, added up. Found on gpt-oss-20b's mmlu_validation trace: the three close 35 / 37 / 36 /
# 30 % of the gap in misses from LRU to Belady at 12.5 / 25 / 40 / 50 % resident, the best single one (0.95) 32 / 33 / 32 / 27 %.
DECAYS = (0.8, 0.95, 0.99)
# The evidence's constants were found on mmlu_validation alone (docs/log.md has what else was tried). Layers whose last choices
# count for a layer, itself and those before it: 1 / 2 / 3 / 5 close 27 / 32 / 34 / 36 % of the gap at 12.5 % resident and 47-49 %
# at 40 % (at half this rate).
SOURCES = 4
RATE = 0.64  # of learning, shared by the rows of the table that were summed
SLOPE_RATE = 1e-4
RARE = 1e-3  # decayed frequencies below are taken for this
# The value of a use that comes a token later, beside one in the next token; and how much of the rate after the next token is the
# decayed frequency (the rest is what the last token predicts).
DISCOUNT = np.float32(np.exp(-1 / 3))
STEADY = 0.85
MAX_TABLE_BYTES = 8 << 20  # a statistics whose table would be larger (58 layers of 256 experts: 58 MiB) goes without evidence


class RoutingStatistics:
    """What is known of each expert's next uses, from how often it was used lately.

    ``expected_uses`` [L, E] is that in the next token, ``value`` [L, E] that of keeping the expert in its slot: the chance that it
    is used, where a use that is a token further away counts for less by ``DISCOUNT``; so the layers that are yet to come in this
    token have a higher value than those just passed. The C++ extension counts a layer's turn as it comes
    (``csrc/statistics.cpp``), also for the native residency's policy: ``native``. Without it, what single tokens chose is stored
    until the result is read, and counted for all layers at once: some thirty small operations of numpy take as long for one layer
    as for a token's 24.
    """

    def __init__(self, experts_per_layer: Sequence[int], *, co_activation: bool = True) -> None:
        num_layers, width = len(experts_per_layer), max(experts_per_layer)
        self._expected_uses: Floats = np.zeros((num_layers, width), np.float32)
        self._used_soon: Floats = np.zeros((num_layers, width), np.float32)  # value, seen from just before the layer's next turn
        self._value: Floats = np.zeros((num_layers, width), np.float32)
        self._turn = np.asarray(DISCOUNT ** (np.arange(num_layers)[:, None] / num_layers), np.float32)  # in the token, [L, 1]
        self._distance = self._turn.copy()  # to the layer's next turn
        self._last = -1  # layer that was routed
        self._recent: Floats = np.zeros((num_layers, width, len(DECAYS)), np.float32)
        self._decays: Floats = np.array(DECAYS, np.float32)
        self._gain: Floats = (1 - self._decays) / np.float32(len(DECAYS))
        self._ones: Floats = np.ones(len(DECAYS), np.float32)
        self._pending: list[tuple[int, Sequence[int]]] = []  # of one token, by ascending layer, with equally many experts
        fits = num_layers * SOURCES * (width + 1) * width * 4 <= MAX_TABLE_BYTES
        self._evidence = CoActivation(num_layers, width) if co_activation and fits else None
        self.native: Any = None if native is None else self._make_native()  # the extension's view of these arrays

    @property
    def expected_uses(self) -> Floats:
        """Not to be written to."""
        if self._pending:
            self._flush()
        return self._expected_uses

    @property
    def value(self) -> Floats:
        """Not to be written to."""
        if self._pending:
            self._flush()
        return self._value

    def routed(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, num_tokens: int = 1) -> None:
        """``layer``'s router chose the distinct ``experts``, for ``counts`` of the ``num_tokens`` tokens (None: for all)."""
        if native is not None:
            self.native.routed(layer, experts, counts, num_tokens)
            return
        pending = self._pending
        if pending and (num_tokens > 1 or layer <= pending[-1][0] or len(experts) != len(pending[0][1])):
            self._flush()
        if num_tokens == 1:
            self._pending.append((layer, experts))
            return
        # As if the tokens had come one by one, in equal proportions.
        recent = self._recent[layer]
        decay = self._decays**num_tokens
        recent *= decay
        fraction = np.asarray(counts if counts is not None else num_tokens, np.float32).reshape(-1, 1) / num_tokens
        recent[np.array(experts, np.intp)] += (1 - decay) / len(DECAYS) * fraction
        expected = recent.dot(self._ones)[None]
        layers = np.array([layer], np.intp)
        self._update_predictions(layers, expected, None)

    def _make_native(self) -> Any:
        arrays = [
            self._decays,
            self._gain,
            self._recent,
            self._expected_uses,
            self._used_soon,
            self._value,
            self._turn,
            self._distance,
        ]
        arrays += self._evidence.arrays() if self._evidence else []
        addresses, shape = [array.ctypes.data for array in arrays], (*self._expected_uses.shape, SOURCES, len(DECAYS))
        return native.make(*shape, addresses, arrays, RATE, SLOPE_RATE, RARE, float(DISCOUNT), STEADY)

    def _flush(self) -> None:
        """Count what single tokens chose."""
        layers = np.array([layer for layer, _ in self._pending], np.intp)
        chosen = np.array([experts for _, experts in self._pending], np.intp)  # [n, k]
        self._pending = []
        recent = self._recent[layers]
        recent *= self._decays
        recent[np.arange(len(layers))[:, None], chosen] += self._gain
        self._recent[layers] = recent
        self._update_predictions(layers, recent.dot(self._ones), chosen)

    def _update_predictions(self, layers: NDArray[np.intp], frequency: Floats, chosen: NDArray[np.intp] | None) -> None:
        """``layers`` [n], ascending, have had their turn: what their ``frequency`` [n, E] and what they chose say of the next."""
        expected = frequency if self._evidence is None else self._evidence.routed(layers, frequency, chosen)
        later = np.float32(STEADY) * frequency + np.float32(1 - STEADY) * expected
        later += np.float32(RARE)
        soon = DISCOUNT * later
        soon /= 1 - DISCOUNT + soon
        self._expected_uses[layers] = expected
        self._used_soon[layers] = expected + (1 - expected) * soon
        if layers[0] <= self._last:
            self._distance[...] = self._turn
        self._distance[layers] = self._turn[layers] * DISCOUNT
        self._last = int(layers[-1])
        np.multiply(self._used_soon, self._distance, out=self._value)

    def state(self) -> dict[str, NDArray[Any]]:
        """What ``restore`` takes: arrays by name."""
        if self._pending:
            self._flush()
        return {"recent": self._recent} | (self._evidence.state() if self._evidence else {})

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from an earlier ``state``. Raises ConfigError, and changes nothing, if it is not one of this shape."""
        mine = self.state()
        for name, array in mine.items():
            other = state.get(name)
            if other is None or other.shape != array.shape or other.dtype != array.dtype or not np.isfinite(other).all():
                raise ConfigError(f"these routing statistics are of another model or damaged ({name}); they are not used")
            if name == "recent" and (other < 0).any():
                raise ConfigError(f"these routing statistics are damaged ({name} is negative); they are not used")
        for name, array in mine.items():
            array[...] = state[name]
        if native is not None:
            self.native.restored()
        else:
            self._update_predictions(np.arange(len(self._recent)), self._recent.dot(self._ones), None)


class CoActivation:
    """Which experts follow which: logistic regression of an expert's use on what its own layer and those before it chose last.

    Its decayed frequency, as a logarithm, is what it starts from. Learned online, by one step of gradient descent a token.
    """

    def __init__(self, num_layers: int, width: int) -> None:
        self._width = width
        self._table: Floats = np.zeros(
            (num_layers * SOURCES * (width + 1), width), np.float32
        )  # the last row of each: nothing known
        self._slope: Floats = np.ones(1, np.float32)  # of the decayed frequency's logarithm
        layers = np.arange(num_layers)[:, None]
        self._sources = np.maximum(layers - np.arange(SOURCES), 0)  # [L, S], those that have chosen when the layer has
        self._first = ((layers * SOURCES + np.arange(SOURCES)) * (width + 1))[:, :, None]  # row of each source's first expert
        self._latest = np.full((num_layers, 1), width, np.intp)  # what each layer chose last, [L, k]
        self._rows = self._unknown(1)  # that were summed for each layer, [L, S k]
        self._chance: Floats = np.zeros((num_layers, width), np.float32)  # what they predict
        self._log: Floats = np.zeros((num_layers, width), np.float32)  # of the frequency that went into it

    def _unknown(self, top_k: int) -> NDArray[np.intp]:
        return (self._first + self._width).repeat(top_k, 2).reshape(len(self._first), -1)

    def expect(self, top_k: int) -> None:
        """Tokens choose ``top_k`` experts from now on; if that is new, nothing is known of what they chose last."""
        if top_k != self._latest.shape[1]:
            self._latest = np.full((len(self._latest), top_k), self._width, np.intp)
            self._rows = self._unknown(top_k)

    def arrays(self) -> list[NDArray[Any]]:
        """What the extension works on, in the order of csrc/statistics.h."""
        return [self._table, self._slope, self._chance, self._log]

    def routed(self, layers: NDArray[np.intp], frequency: Floats, chosen: NDArray[np.intp] | None) -> Floats:
        """How likely each expert of ``layers`` [n], ascending, is to be used in the next token, [n, E].

        ``frequency`` [n, E] is its decayed one, ``chosen`` [n, k] what one token chose; None where it is not known, of many tokens.
        """
        if chosen is None:
            self._latest[layers] = self._width
        else:
            self.expect(chosen.shape[1])
            self._learn(layers, chosen)
            self._latest[layers] = chosen
        rows = (self._first[layers] + self._latest[self._sources[layers]]).reshape(len(layers), -1)
        self._rows[layers] = rows
        log = np.log(frequency + np.float32(RARE))
        logits = np.add.reduce(self._table[rows], 1)
        logits += self._slope * log
        np.negative(logits, out=logits)
        np.exp(logits, out=logits)
        logits += 1
        chance: Floats = np.reciprocal(logits, out=logits)
        self._log[layers], self._chance[layers] = log, chance
        return chance

    def _learn(self, layers: NDArray[np.intp], chosen: NDArray[np.intp]) -> None:
        """One step of gradient descent on the error of what was predicted of this token."""
        error = np.negative(self._chance[layers])
        error[np.arange(len(layers))[:, None], chosen] += 1
        self._slope += np.float32(SLOPE_RATE) * np.vdot(error, self._log[layers])
        rows = self._rows[layers]
        self._table[rows] += (np.float32(RATE / rows.shape[1]) * error)[:, None]

    def state(self) -> dict[str, NDArray[Any]]:
        """What was learned, by name."""
        return {"follows": self._table, "slope": self._slope}
