"""What a client is told when something is wrong, in the shape of the API that it speaks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fate_moe.schedule.scheduler import QueueFullError, StoppedError

__all__ = ["ApiError", "add_error_handlers", "error_body", "error_response", "unsupported"]

_log = logging.getLogger(__name__)

# Parameters that the APIs have and this server does not: the error says so, instead of "unknown".
_KNOWN = {
    *("audio", "function_call", "functions", "modalities", "moderation", "prediction", "web_search_options", "best_of"),
    *("background", "conversation", "max_tool_calls", "previous_response_id", "prompt", "truncation", "context_management"),
    *("container", "mcp_servers", "inference_geo", "speed", "guided_json", "guided_regex", "grammar", "use_beam_search"),
    *("cache_prompt", "n_probs", "mirostat", "typical_p", "samplers", "slot_id", "id_slot", "n_keep", "dry_multiplier"),
}
# OpenAI's ``type`` and Anthropic's, by status.
_KINDS = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("service_unavailable_error", "overloaded_error"),
}
_LEAST_RETRY, _MOST_RETRY = 1, 600  # seconds: below, clients would ask all the time; above, an estimate says little


class ApiError(Exception):
    """An answer that is an error: ``param`` is the parameter that is wrong, ``code`` a word for programs; after ``retry_seconds``
    the same may succeed, where the status says that it may."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400, retry_seconds: float = 0.0
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status, self.retry_seconds = message, param, code, status, retry_seconds


def unsupported(param: str, why: str = "is not supported by this server") -> ApiError:
    """The error for a parameter (or a value of it) that cannot be honoured."""
    return ApiError(f"'{param}' {why}", param, "unsupported_parameter")


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """``error`` in the shape of the API that ``path`` belongs to."""
    openai, anthropic = _KINDS.get(
        error.status, ("invalid_request_error",) * 2 if error.status < 500 else ("server_error", "api_error")
    )
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": anthropic, "message": error.message}}
    return {"error": {"message": error.message, "type": openai, "param": error.param, "code": error.code}}


def error_response(path: str, error: ApiError) -> JSONResponse:
    """The whole answer; those that may succeed later say when to try."""
    seconds = min(max(math.ceil(error.retry_seconds), _LEAST_RETRY), _MOST_RETRY)
    headers = {"Retry-After": str(seconds)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(path, error), error.status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of every route leaves ``app`` in its API's shape."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return error_response(request.url.path, _api_error(request, error))

    for kind in (ApiError, RequestValidationError, HTTPException, QueueFullError, StoppedError):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(Exception, refused)


def _api_error(request: Request, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(request, error)
    if isinstance(error, HTTPException):
        if error.status_code in (404, 405):
            return ApiError(f"there is no {request.method} {request.url.path}", status=error.status_code, code="unknown_url")
        return ApiError(str(error.detail), status=error.status_code)
    if isinstance(error, QueueFullError):
        return ApiError(str(error), status=429, code="queue_full", retry_seconds=error.retry_seconds)
    if isinstance(error, StoppedError):
        return ApiError(str(error), status=503, code="shutting_down")
    _log.error("a request failed", exc_info=error)
    return ApiError("the server failed; its log says why", status=500, code="internal_error")


def _invalid(request: Request, error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by its name."""
    first = _most_telling(error.errors())
    where = _path(first["loc"][1:])
    name = ".".join(where)
    if first["type"] == "json_invalid":
        return ApiError(f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    if not where:
        if "json" not in request.headers.get("content-type", ""):
            return ApiError("the body must be JSON; send it with 'Content-Type: application/json'", status=415)
        return ApiError("the body must be a JSON object")
    if first["type"] == "extra_forbidden":
        if where[-1] in _KNOWN:
            return unsupported(name)
        return ApiError(f"unknown parameter '{name}'", name, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(f"'{name}' is missing", name, "missing_required_parameter")
    if first["type"] == "union_tag_invalid":
        return unsupported(name, f"is of the type {first['ctx']['tag'][:40]!r}, which is not supported")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(f"'{name}': {message[:1].lower()}{message[1:]}", name, "invalid_value")


def _path(location: Sequence[Any]) -> list[str]:
    """Where in the client's JSON an error is: without pydantic's names for the members of unions."""
    path = [
        str(part)
        for part in location
        if not (isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "dict") or part[:1].isupper()))
    ]
    # The tag of a union whose members have a type.
    if path[:1] == ["response_format"]:
        del path[1:2]
    if path[:1] == ["input"]:
        del path[2:3]
    return path


def _most_telling(errors: Any) -> Any:
    """Of the errors of a union's members the one that got furthest; of several, the first."""
    return max(errors, key=lambda one: (one["type"] == "json_invalid", len(one["loc"])))
