"""What all routes share: bodies that are checked, and streams of events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pydantic_core
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.responses import Response

__all__ = ["Body", "JsonRoute", "comment", "event_stream", "joined", "sse"]

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: json.dumps makes one a call


class Body(BaseModel):
    """A JSON object of a client: nothing is converted, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _JsonRequest(Request):
    """Reads JSON as it is defined: no NaN, no half of a surrogate pair, no nesting without end."""

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is no JSON: {error}") from error


class JsonRoute(APIRoute):
    """A route whose body is read by ``_JsonRequest``."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            response: Response = await handler(_JsonRequest(request.scope, request.receive))
            return response

        return handle


def sse(data: Any, event: str | None = None) -> ServerSentEvent:
    """An event whose data is JSON (a string stays as it is)."""
    text = data if isinstance(data, str) else _to_json(data)
    return ServerSentEvent(text, event=event, sep="\n")


def comment(text: str) -> ServerSentEvent:
    """A line that clients skip: it keeps the connection alive."""
    return ServerSentEvent(comment=text, sep="\n")


def joined(events: Iterable[ServerSentEvent]) -> bytes:
    """``events`` as one part of a stream: what there is to say at once takes one call of the system."""
    return b"".join(event.encode() for event in events)


def event_stream(
    events: AsyncIterator[bytes], on_gone: Callable[[], None], status: Callable[[], str], keep_alive_seconds: float
) -> EventSourceResponse:
    """``events`` as a response. ``on_gone`` is called when the client leaves; ``status`` says in a comment what is going on, after
    each ``keep_alive_seconds``."""

    async def gone(message: Any) -> None:
        on_gone()

    return EventSourceResponse(
        events,
        sep="\n",
        ping=keep_alive_seconds,
        ping_message_factory=lambda: comment(status()),
        client_close_handler_callable=gone,
    )
