"""OffloadConfig: what is accepted has a meaning; sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from fate_moe.config import OffloadConfig
from fate_moe.errors import ConfigError
from fate_moe.units import format_bytes, parse_amount, parse_host_compute, parse_size


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vram": "1GiB", "look_ahead": 2}, "one layer ahead; omit look_ahead"),
        ({"device": "cuda", "look_ahead": 3}, "one layer ahead"),
        ({"vram": "1GiB", "exact_activations": True}, "omit exact_activations"),
        ({"vram": "1GiB", "predictor": "temporal"}, "next layer's router"),
        ({"vram": "1GiB", "precision_policy": "budget"}, "precision_policy is one of"),
        ({"host_compute": 0.5}, "give vram too"),
        ({"vram": "1GiB", "host_compute": "most"}, "not auto, off or a fraction"),
        ({"cuda_graph": False}, "cuda_graph is for a GPU"),
        ({"device": "cpu", "vram": "1GiB"}, "omit it"),
        ({"context_length": 0}, "at least 1"),
        ({"io_threads": 1}, "at least 2"),
        ({"ram": "lots"}, "is not a size"),
        ({"prefix_cache": "some"}, "prefix_cache: 'some' is not a size"),
        ({"prefix_cache": "120%"}, "prefix_cache: .* is not between 0 and 100 %"),
        ({"prefix_cache_disk": "25%"}, "prefix_cache_disk: .* is not a size; .*; or off"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        OffloadConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"look_ahead": 2},
        {"exact_activations": True},
        {"vram": "1GiB", "look_ahead": 1},
        {"vram": "1GiB", "cuda_graph": False},
        {"vram": "1GiB", "policy": "lru"},
    ],
)
def test_what_has_a_meaning_is_accepted(options: dict[str, Any]) -> None:
    OffloadConfig(**options)


def test_a_misspelt_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown option 'expert_cash'; did you mean 'expert_cache'"):
        OffloadConfig.from_options({"expert_cash": "1GiB"})


def test_sizes() -> None:
    assert parse_size("4GiB") == parse_size("4096 mib") == parse_size("4G") == 4 << 30
    assert parse_size("1.5GB") == 1_500_000_000
    assert parse_size(17) == 17
    assert parse_amount("25%", 1000) == parse_amount("0.25", 1000) == 250
    assert parse_amount("1.0", 1000) == 1000
    assert (parse_host_compute("auto"), parse_host_compute("off"), parse_host_compute("25%")) == (None, 0.0, 0.25)
    assert [format_bytes(amount) for amount in (12, 1536, 3.5 * 2**30, 2**41)] == ["12 B", "1.5 KiB", "3.5 GiB", "2 TiB"]
    for wrong in ("", "x", "0", "-1", "1 GiBB", "%"):
        with pytest.raises(ConfigError):
            parse_size(wrong)
    for wrong in ("101%", "0%", "1.5", "0.0"):
        with pytest.raises(ConfigError, match="is not"):
            parse_amount(wrong, 1000) if wrong != "1.5" else parse_host_compute(wrong)
