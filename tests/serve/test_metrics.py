"""Metrics and /props of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fate_moe.serve.service import Service

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "server.md"


def metrics(url: str) -> dict[str, float]:
    """All samples, by name and labels."""
    text = httpx2.get(f"{url}/metrics", timeout=60).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {f"{sample.name}{sorted(sample.labels.items()) or ''}": sample.value for sample in samples}


def test_metrics_count_what_was_done(url: str, service: Service) -> None:
    before = metrics(url)
    body = {"prompt": "It was", "max_tokens": 7, "ignore_eos": True}
    assert httpx2.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    after = metrics(url)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more("fate_generation_tokens_total") == 7
    assert more("fate_requests_total[('reason', 'length')]") == 1
    assert more("fate_http_requests_total[('route', '/v1/completions'), ('status', '200')]") == 1
    assert more("fate_time_to_first_token_seconds_count") == more("fate_time_per_output_token_seconds_count") == 1
    assert service.card is not None
    counters = service.card.model.fate.report().experts
    assert after["fate_expert_lookups_total[('result', 'hit')]"] == counters.hits
    assert after["fate_expert_read_bytes_total"] == counters.bytes_read > 0
    assert after["fate_memory_peak_bytes"] >= after["fate_memory_resident_bytes"] * 0.5 > 0


def test_every_metric_and_route_is_documented(url: str) -> None:
    page = PAGE.read_text()
    names = {name.split("[")[0].removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in metrics(url)}
    assert not [name for name in names if f"`{name}`" not in page]
    routes: Any = httpx2.get(f"{url}/openapi.json", timeout=60).json()["paths"]
    assert not [route for route in routes if route.replace("{name}", "NAME") not in page]


def test_props(url: str) -> None:
    props = httpx2.get(f"{url}/props", timeout=60).json()
    assert (props["context_length"], props["vocab_size"], props["experts_per_layer"]) == (1024, 8192, [60] * 12)
    assert props["chat_template"] == "plain"
    assert "Assistant:" in props["chat_template_text"]
    assert props["sampling_defaults"]["temperature"] == 0.7
    assert props["budget_bytes"] > props["expert_cache_bytes"] > 0
