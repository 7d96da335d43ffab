"""The web page: plain HTML, CSS and JavaScript modules, sent as they lie here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import FileResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from fate_moe.serve.live import Live, TooManyWatchersError

__all__ = ["ASSETS", "SECURITY_HEADERS", "live_router", "page_router"]

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


def page_router() -> APIRouter:
    """``/`` and ``/assets/NAME``. They hold no secret and need no key: the page asks for one."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> FileResponse:
        return _file("index.html")

    @router.get("/assets/{name}")
    async def asset(name: str) -> FileResponse:
        if name not in ASSETS:
            raise HTTPException(404, "There is no such file.")
        return _file(name)

    return router


def live_router(live: Callable[[], Live | None]) -> APIRouter:
    """``/live``; ``live`` gives the loaded model's, or None while there is none."""
    router = APIRouter()

    @router.get("/live")
    async def watch() -> EventSourceResponse:
        """Server-sent events: what the experts do (``shape``, then ``tick``)."""
        view = live()
        if view is None:
            raise HTTPException(503, "The model is loading.", {"Retry-After": "1"})
        try:
            events = view.watch()
        except TooManyWatchersError as error:
            raise HTTPException(429, str(error), {"Retry-After": "5"}) from None
        return EventSourceResponse(ServerSentEvent(data=data, event=event) async for event, data in events)

    return router


def _file(name: str) -> FileResponse:
    path = ASSETS[name]
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=SECURITY_HEADERS)
