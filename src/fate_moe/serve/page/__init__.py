"""The web page: plain HTML, CSS and JavaScript modules, sent as they lie here, and the stream that feeds its map."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from fate_moe.serve.errors import ApiError
from fate_moe.serve.live import Event, Live, Load, TooManyWatchersError
from fate_moe.serve.service import Service

__all__ = ["ASSETS", "SECURITY_HEADERS", "live_router", "mount", "page_router"]

_FOLDER = Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# By name, so that nothing else in the folder, or outside it, can be asked for.
ASSETS = {path.name: path for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}

# Nothing inline, nothing from elsewhere: text of a model that got into the page as HTML could still run nothing.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask again, with the ETag: the page and its modules always fit together
}


def mount(app: FastAPI, service: Service) -> None:
    """Add ``/``, ``/assets/NAME`` and ``/live`` to ``app``. Streams end when ``service`` stops."""
    made: list[tuple[Live, asyncio.Task[None]]] = []

    def live() -> Live:
        card = service.model()
        if not made:
            scheduler = service.scheduler
            view = Live(card.model.fate, lambda: Load(scheduler.generated_tokens, scheduler.running, scheduler.waiting))

            async def end() -> None:
                await service.stopping.wait()
                view.close()

            made.append((view, asyncio.get_running_loop().create_task(end())))
        return made[0][0]

    app.include_router(page_router())
    app.include_router(live_router(live))


def page_router() -> APIRouter:
    """``/`` and ``/assets/NAME``. They hold no secret and need no key: the page asks for one."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page() -> FileResponse:
        return _file("index.html")

    @router.api_route("/assets/{name}", methods=["GET", "HEAD"])
    async def asset(name: str) -> FileResponse:
        return _file(name)

    return router


def live_router(live: Callable[[], Live]) -> APIRouter:
    """``/live``; ``live`` gives the loaded model's, called in the event loop, or raises ApiError."""
    router = APIRouter()

    @router.get("/live", response_class=EventSourceResponse)
    async def watch() -> EventSourceResponse:
        """What the experts do, as server-sent events: ``shape``, then ``tick`` several times a second."""
        try:
            events = live().watch()
        except TooManyWatchersError as error:
            raise ApiError(str(error), status=429, code="too_many_watchers") from None
        return EventSourceResponse(_sent(events), sep="\n")

    return router


async def _sent(events: AsyncGenerator[Event, None]) -> AsyncIterator[ServerSentEvent]:
    async with aclosing(events) as open_events:
        async for event, data in open_events:
            yield ServerSentEvent(data, event=event, sep="\n")


def _file(name: str) -> FileResponse:
    if (path := ASSETS.get(name)) is None:
        raise ApiError(f"there is no /assets/{name}", status=404, code="unknown_url")
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=SECURITY_HEADERS)
