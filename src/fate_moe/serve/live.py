"""What the page shows while a model runs: which experts are used, resident and missed, and rates; as server-sent events.

One sampler looks at the engine a few times a second while somebody watches, and all watchers are sent the same text. It reads
counters that are kept anyway (engine/activity.py), from the event loop: nothing is added to the passes of the model.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fate_moe.core import Counters
from fate_moe.machine import resident_memory

if TYPE_CHECKING:
    from fate_moe.engine.activity import Look
    from fate_moe.engine.engine import Engine

__all__ = ["MOST_WATCHERS", "Live", "Load", "TooManyWatchersError"]

_log = logging.getLogger(__name__)

MOST_WATCHERS = 16
_PERIOD = 0.15  # seconds between two looks while something runs
_IDLE_PERIODS = 7  # after so many looks that saw nothing new, one tick
_SHARE = 100  # at most one part in so many of a core's time is for looking
_DEVICE_PERIOD = 1.0  # where a look waits for a device
_WINDOW = 3.0  # seconds that rates are of; longer for a model that writes fewer than _FEW tokens meanwhile
_LONGEST, _FEW = 15.0, 6
_BEHIND = 16  # events that wait for a watcher; one that is further behind gets the whole state instead


class Load(NamedTuple):
    """What the scheduler has to do: tokens generated since it was started, requests that run, requests that wait."""

    generated_tokens: int
    running: int
    queue: int


class Event(NamedTuple):
    """A server-sent event; ``data`` is JSON."""

    event: str
    data: str


class TooManyWatchersError(Exception):
    """MOST_WATCHERS watch already."""


class Live:
    """The stream of one loaded model. Used in one event loop, while the model runs in another thread."""

    def __init__(self, engine: Engine, load: Callable[[], Load], *, period: float = _PERIOD) -> None:
        """``load`` is asked at every look. ``period``: seconds between two looks."""
        self._engine, self._load = engine, load
        self._activity = engine.activity()
        self._period = period if self._activity is not None else max(period, _DEVICE_PERIOD)
        self._layers = _Layers(self._activity.num_experts if self._activity is not None else ())
        self._rates = _Rates()
        self._watchers: set[asyncio.Queue[Event | None]] = set()
        self._sampler: asyncio.Task[None] | None = None
        self._measured = -1.0, 0  # when, and how much

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def watch(self) -> AsyncGenerator[Event, None]:
        """``shape`` first, then ticks, until the consumer leaves or ``close``. Raises TooManyWatchersError."""
        if len(self._watchers) >= MOST_WATCHERS:
            raise TooManyWatchersError(f"{MOST_WATCHERS} pages watch already; close one of them")
        return self._watch()

    async def _watch(self) -> AsyncGenerator[Event, None]:
        events: asyncio.Queue[Event | None] = asyncio.Queue(_BEHIND)
        self._watchers.add(events)
        try:
            if self._sampler is None:
                self._start()
            yield self.shape()
            while (event := await events.get()) is not None:
                yield self.shape() if event.event == "shape" else event
        finally:
            self._watchers.discard(events)
            if not self._watchers:
                self._stop()

    def close(self) -> None:
        """End every watcher's stream."""
        for events in self._watchers:
            while not events.empty():
                events.get_nowait()
            events.put_nowait(None)

    def shape(self) -> Event:
        """The whole state: layers, experts by layer, how often each was used since loading, which are resident (a bit each)."""
        plan, layers = self._engine.plan, self._layers
        facts = {
            "observable": self._activity is not None,
            "layers": len(layers.sizes),
            "experts": layers.sizes,
            "slots": plan.num_slots,
            "budget_bytes": plan.budget_bytes,
            "used": layers.split(layers.uses),
            "resident": [layers.bits(layer) for layer in range(len(layers.sizes))],
        }
        return Event("shape", _dumps(facts))

    def tick(self) -> Event | None:
        """What has happened since the last one; None if nothing has."""
        load, now = self._load(), time.monotonic()
        facts: dict[str, Any] = {"t": round(now, 3)}
        if self._activity is not None:
            look = self._activity.look()
            counters, news = look.counters, self._layers.update(look)
            slots_used: int | None = int(self._layers.resident.sum())
        else:
            counters, news, slots_used = self._engine.counters(), {}, None
        busy = self._rates.add(now, load, counters)
        if not news and not busy and load == self._rates.last_load:
            return None
        self._rates.last_load = load
        facts |= news
        facts |= self._rates.facts()
        facts |= {
            "memory_bytes": self._memory(now),
            "budget_bytes": self._engine.plan.budget_bytes,
            "slots_used": slots_used,
            "running": load.running,
            "queue": load.queue,
        }
        return Event("tick", _dumps(facts))

    def _memory(self, now: float) -> int:
        """Resident bytes, not older than half a second: the kernel takes its time to say."""
        if now - self._measured[0] > 0.5:
            self._measured = now, resident_memory()
        return self._measured[1]

    def _start(self) -> None:
        if self._activity is not None:
            self._activity.start()
            self._layers.update(self._activity.look())
        self._rates = _Rates()
        self._sampler = asyncio.get_running_loop().create_task(self._sample())

    def _stop(self) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
            self._sampler = None
        if self._activity is not None:
            self._activity.stop()

    async def _sample(self) -> None:
        try:
            await self._sample_for_ever()
        except Exception:  # the page says that the connection is lost, and asks again; the model goes on
            _log.exception("the live view ended")
            self.close()

    async def _sample_for_ever(self) -> None:
        quiet = _IDLE_PERIODS  # the first tick comes at once
        while True:
            began = time.thread_time()
            event = self.tick() if self._activity is not None else await asyncio.to_thread(self.tick)
            quiet = 0 if event is not None else quiet + 1
            if event is None and quiet >= _IDLE_PERIODS:
                self._rates.last_load, quiet = None, 0  # so that the next one is sent
            if event is not None:
                for events in self._watchers:
                    self._send(events, event)
            await asyncio.sleep(max(self._period, _SHARE * (time.thread_time() - began)))

    @staticmethod
    def _send(events: asyncio.Queue[Event | None], event: Event) -> None:
        """To one watcher; it never holds up the others."""
        if events.full():
            while not events.empty():
                events.get_nowait()
            event = Event("shape", "")
        events.put_nowait(event)


class _Layers:
    """Counts and residency of all experts, layer after layer in one array each."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._first = [0, *np.cumsum(self.sizes, dtype=int).tolist()]
        total = self._first[-1]
        self._layer = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.uses = np.zeros(total, np.int64)
        self.resident = np.zeros(total, bool)

    def update(self, look: Look) -> dict[str, Any]:
        """Take over what was seen; what is new in it, as a tick says it. Empty if nothing is."""
        news: dict[str, Any] = {}
        uses = np.frombuffer(look.uses, np.int64)
        if len(changed := np.flatnonzero(uses != self.uses)):
            layers, counts = self._layer[changed], uses[changed] - self.uses[changed]
            news["used"] = np.stack([layers, changed - np.take(self._first, layers), counts], 1).tolist()
            self.uses = uses
        if look.missed:
            news["missed"] = [[*expert, count] for expert, count in Counter(look.missed).items()]
        if look.resident is not None:
            resident = np.zeros_like(self.resident)
            first = self._first
            resident[[first[layer] + expert for layer, expert in look.resident]] = True
            layers = np.unique(self._layer[resident != self.resident])
            self.resident = resident
            if len(layers):
                news["resident"] = {str(layer): self.bits(layer) for layer in layers.tolist()}
        return news

    def split(self, values: np.ndarray[Any, Any]) -> list[list[int]]:
        """By layer."""
        return [values[first:end].tolist() for first, end in zip(self._first, self._first[1:], strict=False)]

    def bits(self, layer: int) -> str:
        """Base64 of a bit an expert of ``layer``, the first in the lowest bit of the first byte; set: resident."""
        own = self.resident[self._first[layer] : self._first[layer + 1]]
        return base64.b64encode(np.packbits(own, bitorder="little").tobytes()).decode()


class _Sample(NamedTuple):
    seconds: float
    tokens: int
    hits: int
    lookups: int
    bytes_read: int
    stall_seconds: float


class _Rates:
    """Rates over the last seconds in which something ran. A prompt's reads are not counted for the tokens after it."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()
        self.last_load: Load | None = None

    def add(self, seconds: float, load: Load, counters: Counters) -> bool:
        """Whether anything ran since the last sample."""
        sample = _Sample(
            seconds, load.generated_tokens, counters.hits, counters.lookups, counters.bytes_read, counters.stall_seconds
        )
        samples = self._samples
        busy = bool(samples) and (sample[1:] != samples[-1][1:] or load.running > 0)
        if not busy:
            samples.clear()
        elif samples[-1].tokens == samples[0].tokens != sample.tokens:  # the first token: what came before was the prompt
            while len(samples) > 1:
                samples.popleft()
        samples.append(sample)
        while len(samples) > 2 and seconds - samples[1].seconds > self._window(sample.tokens - samples[1].tokens):
            samples.popleft()
        return busy

    def facts(self) -> dict[str, float | None]:
        """None: nothing ran that the rate could be of."""
        first, last = self._samples[0], self._samples[-1]
        seconds, tokens, lookups = last.seconds - first.seconds, last.tokens - first.tokens, last.lookups - first.lookups
        return {
            "tokens_per_second": round(tokens / seconds, 3) if tokens else None,
            "ready_on_time": round((last.hits - first.hits) / lookups, 4) if lookups else None,
            "bytes_per_token": round((last.bytes_read - first.bytes_read) / tokens) if tokens else None,
            "stall_share": round(min(1.0, (last.stall_seconds - first.stall_seconds) / seconds), 4) if lookups else None,
        }

    @staticmethod
    def _window(tokens: int) -> float:
        return _WINDOW if tokens >= _FEW else _LONGEST


def _dumps(facts: dict[str, Any]) -> str:
    return json.dumps(facts, separators=(",", ":"))
