"""The server under load, in short; ``benchmarks/serving.py`` does it at length."""

from __future__ import annotations

import time

import pytest

from benchmarks.serving import clients, overhead, serving, soak
from fate_moe.serve.options import ServeOptions

pytestmark = pytest.mark.slow


def test_clients_that_come_and_go_get_what_a_lone_client_gets() -> None:
    with serving(ServeOptions(queue=16), expert_cache="25%") as (url, service):
        found = soak(url, service, clients=10, seconds=6, tokens=6, seeds=1)
        assert found.wrong == 0
        assert found.finished > 0
        assert found.left > 0
        assert found.memory_after < found.memory_before + (64 << 20)
        deadline = time.monotonic() + 30  # the last client may have left a token ago
        while service.scheduler.running + service.scheduler.waiting and time.monotonic() < deadline:
            time.sleep(0.05)
        assert service.scheduler.running == service.scheduler.waiting == 0
        measured = overhead(url, service, rounds=2, tokens=8)
        several = clients(url, service, tokens=4, rounds=1, others=2)
    assert several.tokens_per_second.keys() == {1, 4, 16}
    assert measured.server_first_ms > 0
    assert measured.server_token_ms > 0
