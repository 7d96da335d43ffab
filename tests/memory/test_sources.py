"""One contract for all expert sources: the store's, and the doubles that other tests use instead of it."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from fate_moe.core import ExpertId, ExpertSource
from fate_moe.errors import CorruptExpertError, StoreError
from fate_moe.kernels.extension import native
from fate_moe.memory.slots import SlotArena
from fate_moe.store.convert import convert
from fate_moe.store.open import Store, open_store
from fate_moe.store.reader import DiskSource
from tests.support.source_contract import check_errors, check_source
from tests.support.sources import MemorySource, Read, SourceDouble, marked_blobs

A, B = ExpertId(0, 0), ExpertId(1, 2)
EXPERTS = [A, B, ExpertId(1, 3)]
ENDS = (1000, 4096, 5000, 8192)


def memory() -> MemorySource:
    return MemorySource(marked_blobs(EXPERTS, 8192), ENDS)


def gated() -> SourceDouble:
    """A gate that opens a moment after the first read."""
    source = SourceDouble(memory())
    source.gate.clear()

    def unlock() -> None:
        source.has_begun(A)
        source.gate.set()

    threading.Thread(target=unlock, daemon=True).start()
    return source


DOUBLES: dict[str, Callable[[], ExpertSource]] = {
    "memory": memory,
    "plain": lambda: SourceDouble(memory()),
    "slow": lambda: SourceDouble(memory(), 1e-3),
    "one at a time": lambda: SourceDouble(memory(), 1e-3, one_at_a_time=True),
    "gated": gated,
    "tearing": lambda: SourceDouble(memory(), tears=True),
}


@pytest.mark.parametrize("name", DOUBLES)
def test_doubles_keep_the_contract(name: str) -> None:
    check_source(DOUBLES[name](), marked_blobs(EXPERTS, 8192), ENDS)


@pytest.fixture
def store(checkpoint: Callable[[str], Path], tmp_path: Path) -> Store:
    return open_store(convert(checkpoint("qwen3_moe"), tmp_path / "store", "int4"))


def blobs_of(store: Store) -> dict[ExpertId, bytes]:
    """Bytes as they lie in the shards."""
    blobs = {}
    for layer, entry in enumerate(store.manifest.layers):
        for number, expert in enumerate(entry.experts):
            length = store.manifest.layout_of(ExpertId(layer, number)).length
            with open(store.path / entry.shard, "rb") as file:
                blobs[ExpertId(layer, number)] = os.pread(file.fileno(), length, expert.offset)
    return blobs


WAYS = [False] if native is None else [True, False]  # whether the extension reads


def opened(store: Store, by_extension: bool, direct: bool = True) -> DiskSource:
    source = DiskSource(store, direct)
    if not by_extension:
        source.native = None
    return source


@pytest.mark.parametrize("by_extension", WAYS)
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("tears", [True, False])
def test_the_store_keeps_the_contract(store: Store, direct: bool, tears: bool, by_extension: bool) -> None:
    source: ExpertSource = opened(store, by_extension, direct)
    sections = store.manifest.layouts_of(0)[0].sections
    blobs = {expert: blob for expert, blob in blobs_of(store).items() if expert.expert < 3}
    check_source(SourceDouble(source, tears=True) if tears else source, blobs, [s.offset + s.length for s in sections])


@pytest.mark.parametrize("tears", [True, False])
@pytest.mark.parametrize("error", [CorruptExpertError, StoreError])
def test_doubles_fail_as_a_source_does(error: type[StoreError], tears: bool) -> None:
    source = SourceDouble(memory(), tears=tears)
    (source.fails if error is CorruptExpertError else source.shorts)[B] = 1
    check_errors(source, B, A, memory().blobs[A], error)


@pytest.mark.parametrize("by_extension", WAYS)
def test_the_store_fails_as_a_source_does(store: Store, by_extension: bool) -> None:
    blobs, path = blobs_of(store), store.shard_of(B)
    offset = store.manifest.layers[B.layer].experts[B.expert].offset
    with path.open("r+b") as file:
        file.seek(offset + 5)
        file.write(bytes([blobs[B][5] ^ 1]))
    check_errors(opened(store, by_extension), B, ExpertId(1, 1), blobs[ExpertId(1, 1)], CorruptExpertError)
    last = max(blobs, key=lambda e: (e.layer == B.layer, store.manifest.layers[e.layer].experts[e.expert].offset))
    os.truncate(path, path.stat().st_size - 4096)
    check_errors(opened(store, by_extension), last, ExpertId(1, 1), blobs[ExpertId(1, 1)], StoreError)


def test_what_a_failed_read_leaves_is_of_no_use() -> None:
    """Else a test would not see that a slot whose read failed is used."""
    blob = memory().blobs[A]
    for fails in (True, False):
        source, slot = SourceDouble(memory()), SlotArena((1, 8192)).view(0)
        (source.fails if fails else source.shorts)[A] = 1
        with pytest.raises(StoreError):
            source.read(A, slot)
        assert (slot[5] != blob[5]) == fails
        assert slot[8190] != blob[8190]


def test_a_torn_slot_is_seen_while_its_read_is_under_way() -> None:
    source, slot = SourceDouble(memory(), tears=True), SlotArena((1, 8192)).view(0)
    seen: list[bytes] = []
    source.inner.read(B, slot)
    held = bytes(slot[:1000])
    read = source.inner.read

    def look(expert: ExpertId, place: memoryview, first: int = 0, last: int | None = None) -> int:
        seen.append(bytes(place))
        return read(expert, place, first, last)

    source.inner.read = look  # type: ignore[method-assign, assignment, unused-ignore]
    source.read(A, slot, 1)
    assert seen[-1][:1000] == held, "what the slot holds is not torn"
    assert seen[-1][1000] == bytes(slot)[1000] ^ 0xFF
    assert bytes(slot[1000:]) == memory().blobs[A][1000:]


def test_a_double_remembers_and_takes_its_time() -> None:
    source, slot = SourceDouble(memory(), 5e-3, one_at_a_time=True), SlotArena((1, 8192)).view(0)
    began = time.perf_counter()
    threads = [threading.Thread(target=source.read, args=(A, slot, 0, 1)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - began >= 15e-3
    assert source.reads == [Read(A, 0, 1)] * 3
    assert source.has_begun(A, 3)
    assert (source.reading, source.experts) == (0, [A] * 3)
    source.close()
    assert source.closed
    with pytest.raises(AssertionError, match="after close"):
        source.read(A, slot)


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("length", [241, 256, 1024, 1025, 1088, 2049, 70000])
def test_the_extensions_checksum_is_xxh3(length: int) -> None:
    content = random.Random(length).randbytes(length)
    assert native.checksum(content) == xxhash.xxh3_64_intdigest(content)
