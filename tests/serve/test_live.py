"""The live view: what watchers are told, that they share one sampler, and that watching changes no bit of a text."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import anyio
import pytest
import torch

import fate_moe
from fate_moe.core import ExpertId
from fate_moe.kernels.native import native
from fate_moe.serve.live import MOST_WATCHERS, Event, Live, Load, TooManyWatchersError
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.service import Service
from tests.serve.fake import FakeEngine
from tests.support.serving import Script, Scripted, running

FAST = 0.005  # seconds between two looks


def load_of(engine: FakeEngine) -> Callable[[], Load]:
    return lambda: Load(engine.counted.hits, 1, 0)


def live_of(engine: Any, load: Callable[[], Load] = lambda: Load(0, 0, 0)) -> Live:
    return Live(engine, load, period=FAST)


async def take(events: AsyncIterator[Event], kind: str, wanted: Callable[[Any], Any] = lambda facts: True) -> Any:
    """The next event of ``kind`` that is wanted."""
    with anyio.fail_after(20):
        async for event, data in events:
            facts = json.loads(data)
            if event == kind and wanted(facts):
                return facts
    raise AssertionError("the stream ended")


def resident_in(bits: str) -> set[int]:
    packed = base64.b64decode(bits)
    return {number for number in range(8 * len(packed)) if packed[number >> 3] >> (number & 7) & 1}


def test_shape_and_ticks_add_up_to_what_the_engine_did() -> None:
    """Layers of different numbers of experts; the state that a watcher keeps is the engine's."""

    async def main() -> None:
        engine = FakeEngine([8, 3, 17])
        live = live_of(engine, load_of(engine))
        engine.step()  # before anybody watches
        async with aclosing(live.watch()) as events:
            shape = await take(events, "shape")
            assert shape["experts"] == [8, 3, 17]
            assert (shape["layers"], shape["slots"], shape["observable"]) == (3, 14, True)
            used, resident, missed = shape["used"], [resident_in(bits) for bits in shape["resident"]], 0
            misses_before = engine.counted.misses
            for _ in range(5):
                engine.step()
                tick = await take(events, "tick", lambda facts: "used" in facts)
                for layer, expert, count in tick["used"]:
                    used[layer][expert] += count
                for layer, bits in tick.get("resident", {}).items():
                    resident[int(layer)] = resident_in(bits)
                missed += sum(count for *_, count in tick.get("missed", []))
            look = engine.look()
            assert [count for layer in used for count in layer] == look.uses.tolist()
            assert {ExpertId(layer, expert) for layer, row in enumerate(resident) for expert in row} == set(look.resident or ())
            assert missed == engine.counted.misses - misses_before
            assert tick["slots_used"] == len(look.resident or ())
            assert tick["memory_bytes"] > 0
            assert tick["budget_bytes"] == 4 << 30

    asyncio.run(main())


def test_rates_are_of_the_tokens_and_not_of_the_prompt() -> None:
    async def main() -> None:
        engine, load = FakeEngine([4]), [Load(0, 0, 0)]
        live = live_of(engine, lambda: load[0])
        async with aclosing(live.watch()) as events:
            idle = await take(events, "tick")
            assert [idle[name] for name in ("tokens_per_second", "ready_on_time", "bytes_per_token", "stall_share")] == 4 * [None]
            load[0] = Load(0, 1, 2)
            engine.counted.bytes_read += 1 << 40  # the prompt's
            engine.counted.misses += 10
            reading = await take(events, "tick", lambda facts: facts["ready_on_time"] is not None)
            assert (reading["ready_on_time"], reading["tokens_per_second"], reading["queue"]) == (0.0, None, 2)
            for _ in range(4):
                engine.counted.hits += 3
                engine.counted.misses += 1
                engine.counted.bytes_read += 1000
                load[0] = load[0]._replace(generated_tokens=load[0].generated_tokens + 1)
                expected = load[0].generated_tokens
                tick = await take(events, "tick", lambda facts: facts["tokens_per_second"])
                assert tick["bytes_per_token"] == 1000
                assert tick["ready_on_time"] == 0.75, f"after {expected} tokens"

    asyncio.run(main())


def test_watchers_share_one_sampler_and_nothing_runs_without_them() -> None:
    async def main() -> None:
        engine = FakeEngine([4, 4])
        live = live_of(engine, load_of(engine))
        looks = engine.looks
        await asyncio.sleep(5 * FAST)
        assert (engine.started, engine.looks) == (0, looks)
        streams = [live.watch() for _ in range(MOST_WATCHERS)]
        for stream in streams:
            await take(stream, "shape")
        assert engine.started == 1
        with pytest.raises(TooManyWatchersError):
            live.watch()
        engine.step()
        ticks = [await take(stream, "tick", lambda facts: "used" in facts) for stream in streams]
        assert all(tick == ticks[0] for tick in ticks)
        for stream in streams:
            await stream.aclose()
        assert (live.num_watchers, engine.stopped) == (0, 1)
        looks = engine.looks
        await asyncio.sleep(5 * FAST)
        assert engine.looks == looks, "nobody watches"
        async with aclosing(live.watch()) as events:
            assert (await take(events, "shape"))["used"] == [engine.look().uses.tolist()[:4], engine.look().uses.tolist()[4:]]

    asyncio.run(main())


def test_a_slow_watcher_is_sent_the_whole_state_and_holds_nobody_up() -> None:
    async def main() -> None:
        engine = FakeEngine([16])
        live = live_of(engine, load_of(engine))
        slow, quick = live.watch(), live.watch()
        await take(slow, "shape")
        await take(quick, "shape")
        for _ in range(60):  # more than wait for one watcher
            engine.step()
            await take(quick, "tick", lambda facts: "used" in facts)
        shape = await take(slow, "shape")
        assert sum(shape["used"][0]) >= 16
        for stream in (slow, quick):
            await stream.aclose()

    asyncio.run(main())


def test_a_closed_view_ends_its_streams() -> None:
    async def main() -> None:
        live = live_of(FakeEngine([4]))
        stream = live.watch()
        await take(stream, "shape")
        live.close()
        with anyio.fail_after(5):
            assert [event async for event in stream if event.event == "shape"] == []
        assert live.num_watchers == 0

    asyncio.run(main())


def test_an_engine_whose_experts_cannot_be_seen_gives_rates() -> None:
    async def main() -> None:
        engine = FakeEngine([4], observable=False)
        live = Live(engine, load_of(engine), period=FAST)  # type: ignore[arg-type]
        async with aclosing(live.watch()) as events:
            shape = await take(events, "shape")
            assert (shape["observable"], shape["experts"]) == (False, [])
            await take(events, "tick")
            engine.step()
            tick = await take(events, "tick", lambda facts: facts["ready_on_time"] is not None)
            assert "used" not in tick
            assert tick["slots_used"] is None

    asyncio.run(main())


def test_watchers_are_limited_and_do_not_hold_up_the_end_of_the_server() -> None:
    engine = FakeEngine([4])
    card = SimpleNamespace(model=SimpleNamespace(fate=engine))
    service = Service(ServeOptions(drain_seconds=20), Scripted(Script([])), card)  # type: ignore[arg-type]
    with ExitStack() as streams:
        with running(service) as url:
            opened = [streams.enter_context(urlopen(f"{url}/live", timeout=10)) for _ in range(MOST_WATCHERS)]
            assert [stream.readline() for stream in opened] == MOST_WATCHERS * [b"event: shape\n"]
            with pytest.raises(HTTPError) as refused:
                urlopen(f"{url}/live", timeout=10)
            with refused.value as answer:
                assert answer.code == 429
                assert json.load(answer)["error"]["code"] == "too_many_watchers"
                assert answer.headers["Retry-After"]
            began = time.monotonic()
        assert time.monotonic() - began < 10
        assert all(stream.read() is not None for stream in opened), "each stream has an end"
        assert engine.stopped == 1


# --- a real engine ---


def generate(model: Any, tokenizer: Any) -> list[int]:
    inputs = tokenizer("Once upon a time there was a little", return_tensors="pt")
    torch.manual_seed(5)
    tokens: list[int] = model.generate(**inputs, max_new_tokens=48, do_sample=True, pad_token_id=0)[0].tolist()
    return tokens


@pytest.mark.slow
@pytest.mark.skipif(native is None, reason="the extension is not built")
def test_watching_changes_no_token() -> None:
    """The same tokens with two watchers as with none; they are told what the engine counted; reports meanwhile are whole."""
    model, tokenizer = fate_moe.load(
        None, context_length=128, expert_cache="40%", policy="lru", predictor="cross-layer-probability"
    )
    with model.fate as engine:
        unwatched = generate(model, tokenizer)

        async def watch() -> tuple[list[int], dict[tuple[int, int], int], int]:
            live = Live(engine, lambda: Load(0, 1, 0), period=0.001)
            streams = [live.watch(), live.watch()]
            shape, _ = [await take(stream, "shape") for stream in streams]
            used = {(layer, expert): count for layer, row in enumerate(shape["used"]) for expert, count in enumerate(row)}
            answer: list[int] = []
            thread = threading.Thread(target=lambda: answer.extend(generate(model, tokenizer)))
            thread.start()
            resident = dict(enumerate(shape["resident"]))
            ticks = 0

            def update(tick: Any) -> None:
                resident.update((int(layer), bits) for layer, bits in tick.get("resident", {}).items())

            while thread.is_alive() or sum(used.values()) < sum(engine.report().uses_by_bits.values()):
                tick = await take(streams[0], "tick")
                ticks += thread.is_alive()
                update(tick)
                for layer, expert, count in tick.get("used", []):
                    used[layer, expert] += count
            engine.runtime.residency.wait_idle()
            there = set(engine.runtime.residency.resident())

            def is_there(tick: Any) -> bool:
                update(tick)
                return {(layer, expert) for layer, bits in resident.items() for expert in resident_in(bits)} == there

            await take(streams[0], "tick", is_there)
            for stream in streams:
                await stream.aclose()
            return answer, used, ticks

        watched, used, ticks = asyncio.run(watch())
        assert watched == unwatched
        assert ticks > 0, "nothing was seen while the model wrote"
        assert {expert: count for expert, count in used.items() if count} == {
            tuple(expert): count for (expert, _), count in engine.bits_used().items()
        }
        assert engine.runtime.residency.missed is None, "nothing is written down when nobody watches"
