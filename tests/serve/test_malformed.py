"""Ten thousand requests that are wrong: each is answered, none by a failure, and the next good one is served."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import random
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_moe import demo
from fate_moe.engine.prepare import load_tokenizer
from fate_moe.serve.app import build_app
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.service import Service
from tests.support.serving import Script, Scripted, qwen_like_card, running

pytestmark = pytest.mark.slow

TOKENIZER = load_tokenizer(demo.MODEL)
GOOD = {"messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": [1, "x", None]}}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
# A body of every route, with nearly all there is; what is mutated.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "qwen-like",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "t"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "r"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "stop": ["a", "b"],
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1.0},
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "/v1/completions": {"prompt": "p", "echo": True, "logprobs": 2, "max_tokens": 3, "suffix": None, "best_of": 1, "stop": "x"},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "t"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "r"},
        ],
        "instructions": "i",
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "low"},
        "max_output_tokens": 5,
    },
    "/v1/messages": {
        "model": "qwen-like",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}]},
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled", "budget_tokens": 9},
        "stop_sequences": ["x"],
    },
    "/v1/messages/count_tokens": {"model": "qwen-like", "messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"content": "c", "add_special": True, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, "", "x", "\0", "é😀", "x" * 3000),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": {}},
        {"type": "object"},
        {"type": "what"},
        {"$ref": "#/"},
        {"$ref": "#/properties/a"},
        "{%",
        "{{ 1/0 }}",
    ),
    *(
        "<|im_end|>",
        "<think>",
        "</tool_call>",
        "assistant",
        "required",
        "json_schema",
        [1, 2, 3],
        ["a", 1],
        [None],
        {"a": [1, {"b": None}]},
    ),
    {"anyOf": [{"type": "string"}, {"minimum": 3}]},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "integer", "minimum": 5, "maximum": 1},
]


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    found = [at] if at else []
    if isinstance(value, dict):
        found += [path for key, one in value.items() for path in paths_of(one, (*at, key))]
    elif isinstance(value, list):
        found += [path for index, one in enumerate(value) for path in paths_of(one, (*at, index))]
    return found


def put(body: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        body = body[key]
    body[path[-1]] = value


PATHS = {route: paths_of(body) for route, body in BODIES.items()}


def mutated(random: random.Random) -> tuple[str, bytes]:
    """A route's body in which one to three things are replaced, removed, added or renamed; or bytes that are damaged."""
    route = random.choice(list(BODIES))
    body = copy.deepcopy(BODIES[route])
    for _ in range(random.randint(1, 3)):
        path = random.choice(PATHS[route])
        holder: Any = body
        try:
            for key in path[:-1]:
                holder = holder[key]
            kind = random.random()
            if kind < 0.7:
                holder[path[-1]] = copy.deepcopy(random.choice(NASTY))
            elif kind < 0.8:
                del holder[path[-1]]
            elif kind < 0.9 and isinstance(holder, dict):
                holder[random.choice(["foo", "", "audio", "type", "role", "content"])] = random.choice(NASTY)
            else:
                holder[path[-1]] = [copy.deepcopy(holder[path[-1]])] * random.randint(0, 3)
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change took it away
    data = json.dumps(body).encode()
    if random.random() < 0.1:
        at = random.randrange(len(data))
        data = (
            data[:at]
            + random.choice([b"", b"\x00", b"\xff", b"\\ud800", b"NaN", b"[" * 500, b'"', b"}"])
            + data[at + random.randint(0, 2) :]
        )
    return route, data


@functools.cache
def the_app() -> FastAPI:
    return build_app(Service(ServeOptions(max_body=100_000), Scripted(Script(["ok"])), qwen_like_card(TOKENIZER)))


def against_the_app(check: Callable[[httpx2.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        transport = httpx2.ASGITransport(app=the_app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
            await check(client)

    asyncio.run(run())


async def is_answered(client: httpx2.AsyncClient, route: str, data: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = await asyncio.wait_for(client.post(route, content=data, headers=headers), 20)
    assert answer.status_code < 500, (route, data, answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"], (route, data)
        assert set(error) == ({"type", "message"} if route.startswith("/v1/messages") else {"message", "type", "param", "code"})


async def is_well(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=GOOD)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "ok"


def test_the_bodies_themselves_are_good_or_refused_for_one_reason() -> None:
    async def check(client: httpx2.AsyncClient) -> None:
        for route, body in BODIES.items():
            answer = await client.post(route, json=body)
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "unsupported_parameter", (route, answer.text)

    against_the_app(check)


def test_nine_thousand_mutated_bodies() -> None:
    source = random.Random(20)

    async def check(client: httpx2.AsyncClient) -> None:
        for number in range(9100):
            await is_answered(client, *mutated(source))
            if number % 500 == 0:
                await is_well(client)
        await is_well(client)

    against_the_app(check)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(sorted(BODIES)), st.integers(0, 10**6), JSON), min_size=15, max_size=15))
def test_any_json_anywhere(changes: list[tuple[str, int, Any]]) -> None:
    """Nine hundred more, ten thousand in all, which hypothesis makes smaller where one fails."""

    async def check(client: httpx2.AsyncClient) -> None:
        for route, number, value in changes:
            body = copy.deepcopy(BODIES[route])
            put(body, PATHS[route][number % len(PATHS[route])], value)
            await is_answered(client, route, json.dumps(body).encode("utf-8", "surrogatepass"))
        await is_well(client)

    against_the_app(check)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        b"GET /v1/models/%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST //v1//completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
        b"DELETE /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"",
    ],
)
def test_what_is_no_http_is_refused_and_the_server_lives(raw: bytes) -> None:
    service = Service(ServeOptions(), Scripted(Script(["ok"])), qwen_like_card(TOKENIZER))
    with running(service) as url, httpx2.Client(base_url=url, timeout=20) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
            try:
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(4096)
            except OSError:  # the server hung up while it was sent
                answer = b""
        assert not answer.startswith(b"HTTP/1.1 5"), answer
        assert client.post("/v1/chat/completions", json=GOOD).status_code == 200
