"""A server with the routes that the page calls and no model: answers are scripted, experts are used at random.

By hand: ``python -m tests.serve.fake --port 8000 --shape 24x32``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from array import array
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from fate_moe.core import Counters, ExpertId
from fate_moe.engine.activity import Look
from fate_moe.serve.errors import ApiError, add_error_handlers
from fate_moe.serve.live import Live, Load
from fate_moe.serve.page import live_router, page_router

ATTACK = """<script>window.attacked = 1</script><img src=x onerror="window.attacked = 2">

[click](javascript:window.attacked=3) [click](data:text/html,<script>window.attacked=4</script>) ![x](javascript:window.attacked=5)

<a href="javascript:window.attacked=6">click</a> <javascript:window.attacked=7>

| a | <iframe srcdoc="<script>parent.attacked=8</script>"></iframe> |
| --- | --- |
| <svg onload="window.attacked=9"> | [x](https://example.com/"onmouseover="window.attacked=10) |

```html"><script>window.attacked=11</script>
</code></pre><script>window.attacked = 12</script>
```
# <b onclick="window.attacked=13">heading</b>
"""

TOUR = """A Mixture-of-Experts layer holds many small networks, the **experts**. A *router* picks a few of them for each token, \
so most of the weights rest at any moment.

## Why that helps

1. Only the chosen experts have to be in memory.
2. The others wait on disk:
   - they are read when a router asks for them,
   - or a little earlier, when a prediction expects them.

| where | share of the weights | speed |
| :--- | ---: | ---: |
| resident | 52 % | 34 GB/s |
| on disk | 48 % | 1.2 GB/s |

```python
def route(logits, k=8):
    best = sorted(range(len(logits)), key=logits.__getitem__)
    return best[-k:]  # the experts of this token
```

> The text does not depend on how much fits into memory.

See [the docs](https://example.com/docs) for `--ram` and the rest.
"""


class Plan(NamedTuple):
    num_slots: int
    budget_bytes: int


class FakeEngine:
    """Uses experts at random, with favourites, and reads what is missing."""

    def __init__(self, sizes: list[int], resident: float = 0.5, observable: bool = True, seed: int = 0) -> None:
        self.num_experts, self._observable = tuple(sizes), observable
        self._random = random.Random(seed)
        total = sum(sizes)
        self.plan = Plan(max(1, int(total * resident)), 4 << 30)
        self._all = [ExpertId(layer, expert) for layer, size in enumerate(sizes) for expert in range(size)]
        self._resident = dict.fromkeys(self._random.sample(self._all, self.plan.num_slots))
        self._favourites = [self._random.sample(range(size), size) for size in sizes]
        self._uses, self._missed, self.counted = array("q", bytes(8 * total)), list[ExpertId](), Counters()
        self.started = self.stopped = self.looks = 0

    def step(self) -> None:
        """One token."""
        first = 0
        for layer, size in enumerate(self.num_experts):
            chosen = {self._favourites[layer][min(size - 1, int(self._random.expovariate(7 / size)))] for _ in range(4)}
            for number in chosen:
                expert = ExpertId(layer, number)
                self._uses[first + number] += 1
                if expert in self._resident:
                    self.counted.hits += 1
                    self._resident[self._resident.pop(expert) or expert] = None
                    continue
                self._missed.append(expert)
                self.counted.misses += 1
                self.counted.bytes_read += 1 << 19
                self.counted.stall_seconds += 0.0002
                self._resident.pop(next(iter(self._resident)))
                self._resident[expert] = None
            first += size

    def activity(self) -> Any:
        return self if self._observable else None

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped += 1

    def look(self) -> Look:
        self.looks += 1
        missed, self._missed = self._missed, []
        return Look(self._uses[:], missed, list(self._resident), replace(self.counted))

    def counters(self) -> Counters:
        return replace(self.counted)


class FakeServer:
    """``script``: the answer to a message that contains the key; others get ``TOUR``. Texts are streamed in small pieces."""

    def __init__(self, sizes: list[int], *, delay: float = 0.02, api_key: str | None = None, observable: bool = True) -> None:
        self.engine = FakeEngine(sizes, observable=observable)
        self.delay, self.api_key = delay, api_key
        self.requests: list[dict[str, Any]] = []
        self.cancelled = 0
        self.generated = self.running = 0
        self.loading: float | None = None  # or the seconds since it began
        self.script = {"attack": ATTACK, "tour": TOUR, "short": "Yes, *indeed*."}
        self.live = Live(self.engine, lambda: Load(self.generated, self.running, 0))  # type: ignore[arg-type]
        self.app = self._app()

    def _app(self) -> FastAPI:
        app = FastAPI()

        def loading() -> ApiError:
            return ApiError("the model is being loaded; try again soon", status=503, code="model_loading")

        @app.middleware("http")
        async def key(request: Request, call_next: Any) -> Any:
            guarded = request.url.path.startswith(("/v1", "/live", "/props"))
            if guarded and self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
                return JSONResponse(
                    {"error": {"message": "Invalid API key.", "type": "authentication_error", "code": "invalid_api_key"}}, 401
                )
            return await call_next(request)

        @app.get("/health")
        async def health() -> Any:
            if self.loading is not None:
                return JSONResponse({"status": "loading", "seconds": self.loading}, 503)
            return {"status": "ok"}

        @app.get("/props")
        async def props() -> Any:
            return {
                "model": "fake-moe-8x7b",
                "context_length": 4096,
                "budget_bytes": self.engine.plan.budget_bytes,
                "num_layers": len(self.engine.num_experts),
                "experts_per_layer": self.engine.num_experts,
                "chat_template": "model",
                "version": "0",
                "sampling_defaults": {"temperature": 0.7, "top_p": 0.95, "top_k": 40},
            }

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            if self.loading is not None:
                raise loading()
            body = await request.json()
            self.requests.append(body)
            text = body["messages"][-1]["content"]
            if "too long" in text:
                message = "This model's maximum context length is 4096 tokens, and the prompt has 5000."
                return JSONResponse(
                    {"error": {"message": message, "type": "invalid_request_error", "code": "context_length_exceeded"}}, 400
                )
            return EventSourceResponse(self._answer(text))

        def live() -> Live:
            if self.loading is not None:
                raise loading()
            return self.live

        app.include_router(page_router())
        app.include_router(live_router(live))
        add_error_handlers(app)
        return app

    async def _answer(self, message: str) -> AsyncIterator[ServerSentEvent]:
        text = next((answer for key, answer in self.script.items() if key in message), TOUR)
        if "for ever" in message:
            text *= 50
        self.running += 1
        try:
            if "queue" in message:
                for position in (2, 1):
                    yield ServerSentEvent(comment=f"queued, {position} ahead")
                    await asyncio.sleep(0.4)
            if "queue" in message or "slow" in message:
                for done in range(0, 513, 64):
                    yield ServerSentEvent(comment=f"reading the prompt, {done} of 512 tokens")
                    await asyncio.sleep(0.1)
            if "think" in message:
                for word in ("The", "user", "wants", "a", "tour."):
                    yield self._chunk({"reasoning_content": word + " "})
                    await asyncio.sleep(self.delay)
            position = 0
            while position < len(text):
                end = position + random.randint(2, 6)
                yield self._chunk({"content": text[position:end]})
                position = end
                self.generated += 1
                self.engine.step()
                await asyncio.sleep(self.delay)
            timings = {"decode_tokens_per_second": 1 / max(self.delay, 0.001), "ready_on_time": 0.93, "bytes_read": 5 << 20}
            usage = {"prompt_tokens": 12, "completion_tokens": 80, "total_tokens": 92}
            yield ServerSentEvent(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "timings": timings}))
            yield ServerSentEvent(json.dumps({"choices": [], "usage": usage}))
            yield ServerSentEvent("[DONE]")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    @staticmethod
    def _chunk(delta: dict[str, str]) -> ServerSentEvent:
        return ServerSentEvent(json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}))


def main() -> None:
    """Serve until interrupted."""
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--shape", default="24x32")
    parser.add_argument("--key")
    options = parser.parse_args()
    layers, experts = map(int, options.shape.split("x"))
    uvicorn.run(FakeServer([experts] * layers, api_key=options.key).app, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
