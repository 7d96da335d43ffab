"""How fast experts travel is measured."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fate_moe.gpu.link import measure_link
from tests.support.device import CPU


def test_measuring() -> None:
    link = measure_link("simulated", CPU, blob_bytes=4096, num_blobs=2, memory_bytes=1 << 20, seconds=0.01)
    assert all(rate > 0 for rate in (link.dma, link.zero_copy, link.memory, link.both_zero_copy, link.both_memory))
