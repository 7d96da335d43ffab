"""What a request passes before the routes: key, host name, size of the body; and what counts and logs it."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fate_moe.serve.errors import ApiError, error_response

__all__ = ["Guard", "RequestLog"]

# Open without a key: a load balancer asks for health, and a page has to load before it can ask for the key.
_OPEN = ("/health", "/", "/favicon.ico")  # and /assets/

_log = logging.getLogger("fate_moe.serve.requests")


class Guard:
    """Refuses calls without the key, from a foreign host name, and bodies above ``max_body`` bytes, before anything is parsed."""

    def __init__(self, app: ASGIApp, api_key: str | None, allowed_hosts: tuple[str, ...], max_body: int) -> None:
        self._app, self._hosts, self._max_body = app, allowed_hosts, max_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        try:
            self._check(headers, path, scope["method"])
        except ApiError as error:
            await error_response(path, error)(scope, receive, send)
            return
        too_large, started, taken = False, False, 0

        async def limited() -> Message:
            nonlocal taken, too_large
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body:
                too_large = True
                return {"type": "http.disconnect"}
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if too_large and not started:
                return  # what a route says of a body that was cut off
            started = True
            await send(message)

        try:
            await self._app(scope, limited, watched)
        except Exception:
            if not too_large:
                raise
        if too_large and not started:
            await error_response(path, self._too_large())(scope, receive, send)

    def _check(self, headers: Headers, path: str, method: str) -> None:
        if self._hosts and _host_of(headers.get("host", "")) not in self._hosts:
            raise ApiError("this server answers to localhost only; start it with --api-key to call it by another name", status=403)
        is_open = path in _OPEN or path.startswith("/assets/") or method == "OPTIONS"
        if self._key is not None and not is_open:
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
            if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._key):
                raise ApiError("the api key is missing or wrong", status=401, code="invalid_api_key")
        if (length := headers.get("content-length", "")).isdigit() and int(length) > self._max_body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(f"the request is larger than {self._max_body} bytes (--max-body)", status=413, code="request_too_large")


def _host_of(header: str) -> str:
    """The Host header without its port."""
    name, colon, port = header.rpartition(":")
    return name if colon and port.isdigit() else header


class RequestLog:
    """Counts every answer, and writes a line for each where that was asked for: method, path, status, seconds. No contents."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], Any], log: bool) -> None:
        self._app, self._count, self._says = app, count, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # as nginx counts clients that left before an answer began

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = scope.get("route")
            self._count(getattr(route, "path", "other"), status)
            if self._says:
                seconds = time.perf_counter() - began
                # The path is decoded: a line end or an escape sequence in it would forge lines of the log.
                path = "".join(letter if letter.isprintable() else "\ufffd" for letter in scope["path"])
                _log.warning("%s %s %d %.3f s", scope["method"], path, status, seconds)
