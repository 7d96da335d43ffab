"""What was measured is kept, and decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from fate_moe.gpu.link import Link, load_link, measure_link, save_link
from fate_moe.switches import cache_home
from tests.support.device import CPU

FAST = Link("H", 16, 50e9, 45e9, 160e9, 45e9, 120e9)


def test_the_cpu_helps_where_it_adds_much() -> None:
    assert FAST.cpu_fraction == pytest.approx(78 / 123)
    assert replace(FAST, both_memory=12e9).cpu_fraction == 0.0
    assert replace(FAST, both_zero_copy=20e9, both_memory=50e9).cpu_fraction == 0.0, (
        "both at once are hardly faster than the link alone"
    )


def test_kept_for_the_same_gpu_alone() -> None:
    save_link(FAST)
    assert load_link("H") == FAST
    assert load_link("another") is None
    (cache_home() / "link.json").write_text("{}")
    assert load_link("H") is None


def test_measuring() -> None:
    link = measure_link("simulated", CPU, blob_bytes=4096, num_blobs=2, memory_bytes=1 << 20, seconds=0.01)
    assert all(rate > 0 for rate in (link.dma, link.zero_copy, link.memory, link.both_zero_copy, link.both_memory))
