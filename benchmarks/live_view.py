"""What watching costs: processor time per token with two watchers and without, in turns; and of one look at the engine.

``python -m benchmarks.live_view`` (the embedded model, 40 % of its experts resident).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import torch

import fate_moe
from fate_moe.serve.live import Live, Load

TOKENS, TURNS, LOOKS = 192, 12, 200


def generate(model: Any, inputs: Any) -> float:
    """Milliseconds of processor time per token, all threads."""
    torch.manual_seed(5)
    began = time.process_time()
    model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=True, pad_token_id=0)
    return 1e3 * (time.process_time() - began) / TOKENS


async def turn(model: Any, inputs: Any, live: Live | None) -> float:
    """One text, with two watchers of ``live`` or none."""

    async def read(live: Live) -> None:
        async for _ in live.watch():
            pass

    watchers = [asyncio.create_task(read(live)) for _ in range(2)] if live is not None else []
    await asyncio.sleep(0.05)
    spent = await asyncio.to_thread(generate, model, inputs)
    for watcher in watchers:
        watcher.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)
    return spent


def main() -> None:
    """Print medians and spreads."""
    model, tokenizer = fate_moe.load(None, context_length=512, expert_cache="40%", policy="lru")
    with model.fate as engine:
        inputs = tokenizer("Once upon a time there was a little", return_tensors="pt")
        live = Live(engine, lambda: Load(0, 1, 0))
        generate(model, inputs)
        began = time.process_time()
        for _ in range(LOOKS):
            live.tick()
        print(f"a look and its text: {1e3 * (time.process_time() - began) / LOOKS:.3f} ms")
        spent: dict[str, list[float]] = {"nobody watches": [], "two watch": []}
        for _ in range(TURNS):
            spent["nobody watches"].append(asyncio.run(turn(model, inputs, None)))
            spent["two watch"].append(asyncio.run(turn(model, inputs, live)))
        for name, values in spent.items():
            print(f"{name}: {statistics.median(values):.2f} ms a token, {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
