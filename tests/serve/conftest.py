"""The embedded model behind a real server, once for all tests of the APIs."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

import fate_moe
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.service import Service
from tests.support.serving import running, wait_for


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    options = ServeOptions(keep_alive_seconds=0.2, queue=64)
    service = Service.loading(options, "embedded", lambda: fate_moe.load(expert_cache="25%", context_length=1024))
    wait_for(lambda: service.card or service.failure, 300)
    assert service.card is not None, service.failure
    yield service
    service.close()
    service.card.model.fate.close()


@pytest.fixture(scope="session")
def url(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    options = {"max_retries": 0, "timeout": 120, "_strict_response_validation": True}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", **options) as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture(scope="session")
def lenient(client: openai.OpenAI) -> openai.OpenAI:
    """For what OpenAI's own server sends although the package's schema has no room for it: null as the reason of a text that goes
    on, and as the log probability of a prompt's first token."""
    return openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120, _strict_response_validation=True) as client:
        yield client
