"""How the server behaves: who may call, how much, how long it waits, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from fate_moe import demo
from fate_moe.engine.prepare import load_tokenizer
from fate_moe.errors import ConfigError
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.server import Server, bind, run
from fate_moe.serve.service import Service
from tests.support.serving import Script, Scripted, qwen_like_card, running, wait_for

TOKENIZER = load_tokenizer(demo.MODEL)
ASK = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"
ENDLESS = Script(["a", None, "b"])


@contextmanager
def served(*scripts: Script, capacity: int = 64, **options: Any) -> Iterator[tuple[httpx2.Client, Scripted, Service]]:
    scheduler = Scripted(*(scripts or (Script(["ok"]),)), capacity=capacity)
    service = Service(ServeOptions(**options), scheduler, qwen_like_card(TOKENIZER))
    with running(service) as url, httpx2.Client(base_url=url, timeout=20) as client:
        yield client, scheduler, service


def test_the_key_is_asked_for_everywhere_but_where_it_cannot_be() -> None:
    with served(api_key="sesame") as (client, _, _):
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/props", "/metrics", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code == 401, path
        refused = client.post(CHAT, json=ASK, headers={"Authorization": "Bearer wrong"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        anthropic = client.post("/v1/messages", json={}, headers={b"x-api-key": b"wrong\xe9"})
        assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (401, "authentication_error")
        for headers in ({"Authorization": "Bearer sesame"}, {"authorization": "bearer  sesame"}, {"x-api-key": "sesame"}):
            assert client.post(CHAT, json=ASK, headers=headers).status_code == 200


def test_a_loopback_server_without_a_key_answers_to_its_own_names_only() -> None:
    """Or a page of another site could reach it through a name of its own."""
    with served() as (client, _, _):
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:80", "[::1]"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
    with served(api_key="k") as (client, _, _):
        assert client.get("/v1/models", headers={"Host": "x.example", "x-api-key": "k"}).status_code == 200


def test_pages_of_other_sites_may_call_where_cors_says_so() -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with served(cors=("https://a.example",), api_key="k") as (client, _, _):
        allowed = client.options(CHAT, headers={**ask, "Access-Control-Request-Headers": "authorization"})
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in client.options(CHAT, headers={**ask, "Origin": "https://b.example"}).headers
        assert client.get("/health", headers={"Origin": "https://a.example"}).headers["access-control-allow-origin"]
        refused = client.get("/v1/models", headers={"Origin": "https://a.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
    with served() as (client, _, _):
        assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": "https://a.example"}).headers


def test_large_bodies_are_refused_whether_they_say_their_length_or_not() -> None:
    with served(max_body=2000) as (client, _, _):
        large = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
        headers = {"content-type": "application/json"}
        for content in (large, iter([large[:1500], large[1500:]])):
            refused = client.post(CHAT, content=content, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
        refused = client.post("/v1/messages", content=large, headers=headers)
        assert refused.json()["error"]["type"] == "request_too_large"
        assert client.post(CHAT, json=ASK).status_code == 200


def test_a_full_queue_says_when_to_try_again() -> None:
    with served(ENDLESS, capacity=1) as (client, scheduler, _):
        thread = threading.Thread(target=lambda: client.post(CHAT, json=ASK))
        thread.start()
        wait_for(lambda: scheduler.running)
        for path, body in ((CHAT, ASK), ("/v1/messages", {**ASK, "model": "qwen-like", "max_tokens": 5})):
            refused = client.post(path, json=body)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "8")
        assert client.post(CHAT, json={**ASK, "stream": True}).status_code == 429
        scheduler.go.set()
        thread.join(10)
        assert client.post(CHAT, json={**ASK, "n": 2}).status_code == 429  # both or none
        wait_for(lambda: not scheduler.running)


def test_more_texts_than_may_ever_wait_are_no_matter_of_trying_again() -> None:
    with served(queue=3) as (client, _, _):
        refused = client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        assert "4 texts" in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": ["a", "b", "c"]}).status_code == 200


def test_before_the_model_is_there_everything_but_health_waits() -> None:
    go = threading.Event()

    def load() -> Any:
        go.wait(20)
        raise OSError("no such disk")

    service = Service.loading(ServeOptions(), "slow", load)
    with running(service) as url, httpx2.Client(base_url=url) as client:
        assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "loading")
        for answer in (client.get("/v1/models"), client.post(CHAT, json=ASK), client.get("/props")):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.json()["error"]["code"] == "model_loading"
        assert client.get("/metrics").status_code == 200
        go.set()
        wait_for(lambda: service.failure)
        assert client.get("/health").json() == {"status": "error", "error": "no such disk"}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_client_that_leaves_cancels_its_work(path: str, stream: bool) -> None:
    bodies: dict[str, Any] = {
        CHAT: {**ASK, "n": 2},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {**ASK, "model": "qwen-like", "max_tokens": 5},
    }
    with served(ENDLESS) as (client, scheduler, _):
        body = json.dumps({**bodies[path], "stream": stream}).encode()
        host = client.base_url
        with socket.create_connection((host.host, host.port)) as connection:
            head = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}")
            connection.sendall("\r\n".join((*head, "", "")).encode() + body)
            wait_for(lambda: scheduler.tickets)
            if stream:
                connection.recv(100)
        wait_for(lambda: all(ticket.is_cancelled for ticket in scheduler.tickets))


def test_a_stream_says_where_it_waits_and_that_it_lives() -> None:
    with (
        served(Script([None, "ok"]), keep_alive_seconds=0.05) as (client, scheduler, _),
        client.stream("POST", CHAT, json={**ASK, "stream": True}) as answer,
    ):
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if len([one for one in lines if one.startswith(": reading")]) > 3:
                scheduler.go.set()
    comments = [line for line in lines if line.startswith(":")]
    assert comments[:2] == [": queued, 1 ahead", ": queued, next"]
    assert all(comment.startswith(": reading the prompt, 0 of ") for comment in comments[2:-1])
    assert lines.count("data: [DONE]") == 1


def test_draining_lets_answers_end_and_takes_no_more() -> None:
    scheduler = Scripted(ENDLESS)
    service = Service(ServeOptions(drain_seconds=20), scheduler, qwen_like_card(TOKENIZER))
    listener, url = bind(ServeOptions(port=0))
    server = Server(service)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    wait_for(lambda: server.started)
    with httpx2.Client(base_url=url, timeout=20) as client, client.stream("POST", CHAT, json={**ASK, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if '"a"' in line)
        server.should_exit = True
        wait_for(lambda: service.stopping.is_set())
        time.sleep(0.2)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{url}/health")
        assert thread.is_alive()
        scheduler.go.set()
        assert "data: [DONE]" in list(lines)
    thread.join(10)
    assert not thread.is_alive()


def test_what_does_not_end_in_time_is_cut_off() -> None:
    scheduler = Scripted(ENDLESS)
    service = Service(ServeOptions(drain_seconds=1), scheduler, qwen_like_card(TOKENIZER))
    with running(service) as url, httpx2.Client(base_url=url, timeout=20) as client:

        def ask() -> None:
            with pytest.raises(httpx2.TransportError):
                client.post(CHAT, json=ASK)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: scheduler.running)
    thread.join(10)
    assert all(ticket.is_cancelled for ticket in scheduler.tickets)


def test_a_signal_that_comes_while_the_model_loads_ends_the_server() -> None:
    events = []

    def load() -> Any:
        events.append(httpx2.get(f"{url}/health").json()["status"])
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(20)
        finally:
            events.append("cleaned up")

    listener, url = bind(ServeOptions(port=0))
    with listener, pytest.raises(KeyboardInterrupt):
        run(ServeOptions(), listener, "slow", load, lambda: events.append("ready"))
    assert events == ["loading", "cleaned up"]
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{url}/health")
    assert not [thread.name for thread in threading.enumerate() if thread.name == "fate-http"]


def test_requests_are_logged_without_their_contents_and_only_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    secret = {"messages": [{"role": "user", "content": "my secret"}]}
    with caplog.at_level("DEBUG", "fate_moe"):
        with served(Script(["whispered"])) as (client, _, _):
            client.post(CHAT, json=secret)
        assert "POST" not in caplog.text
        with served(Script(["whispered"]), log_requests=True) as (client, _, _):
            client.post(CHAT, json=secret)
        assert f"POST {CHAT} 200" in caplog.text
        assert "secret" not in caplog.text
        assert "whispered" not in caplog.text
        with served(Script(["whispered"]), log_requests=True, log_prompts=True) as (client, _, _):
            client.post(CHAT, json=secret)
        assert "my secret" in caplog.text
        assert "whispered" in caplog.text


def test_two_servers_on_a_port() -> None:
    listener, url = bind(ServeOptions(port=0))
    with listener:
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} is in use, perhaps by another fate serve; stop it"):
            bind(ServeOptions(port=port))


def test_addresses_that_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match="cannot listen on no-such-host"):
        bind(ServeOptions(host="no-such-host.invalid"))
    with pytest.raises(ConfigError, match="between 0 and 65535"):
        ServeOptions(port=70000)
    listener, url = bind(ServeOptions(host="::1", port=0))
    listener.close()
    assert url.startswith("http://[::1]:")


def test_metrics_are_prometheus() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with served(Script(["a", "b", "c"])) as (client, _, service):
        service.card = None  # a script has no engine to ask
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        families = {family.name for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert {"fate_http_requests", "fate_requests", "fate_time_to_first_token_seconds"} <= families
