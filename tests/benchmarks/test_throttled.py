"""The link of known speed behind which "never slower than not trying" is measured."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.throttled import ThrottledSource
from fate_moe.core import ExpertId


def test_reads_share_the_link_and_bring_what_was_asked_for() -> None:
    """Four reads of 10 ms each take 40 ms at least, however many threads ask; a wait may be longer, never shorter."""
    blobs = {ExpertId(0, number): bytes([number]) * 1000 for number in range(4)}
    source = ThrottledSource(blobs, 100_000.0)
    slots = [bytearray(4096) for _ in blobs]
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(source.read, blobs, map(memoryview, slots)))
    assert time.perf_counter() - began >= 0.04
    assert sizes == [1000] * 4
    assert [bytes(slot[:1001]) for slot in slots] == [blob + b"\0" for blob in blobs.values()]


def test_what_was_not_used_of_the_link_is_lost() -> None:
    source = ThrottledSource({ExpertId(0, 0): bytes(1000)}, 100_000.0)
    source.read(ExpertId(0, 0), memoryview(bytearray(1000)))
    time.sleep(0.03)
    began = time.perf_counter()
    source.read(ExpertId(0, 0), memoryview(bytearray(1000)))
    assert time.perf_counter() - began >= 0.01
