"""Reading blobs: complete, checked once, past the page cache if the file system allows it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe.core import ExpertId
from fate_moe.errors import CorruptExpertError, StoreError
from fate_moe.io import direct
from fate_moe.io.direct import DirectFile, anonymous_buffer
from fate_moe.io.tensorfile import read_header
from fate_moe.store.convert import convert
from fate_moe.store.format import blob_layout
from fate_moe.store.open import Store, load_dense, open_store, verify
from fate_moe.store.reader import DiskSource
from fate_moe.store.rows import StoredRows


@pytest.fixture
def store(checkpoint: Callable[[str], Path], tmp_path: Path) -> Store:
    return open_store(convert(checkpoint("qwen3_moe"), tmp_path / "store", "int4"))


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a process that has not fallen back to buffered reads yet."""
    monkeypatch.setattr(direct, "_fallback_logged", threading.Event())


def slot_of(store: Store) -> memoryview:
    return memoryview(anonymous_buffer(store.manifest.slot_bytes))


def by_python(store: Store) -> DiskSource:
    """A source that reads without the extension, for what only its calls show (tests/memory/test_sources.py has the other)."""
    source = DiskSource(store)
    source.native = None
    return source


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Refuse O_DIRECT like tmpfs (before Linux 6.6) and some FUSE and network file systems; returns the flags of every open."""
    real, seen = os.open, []

    def refusing(path: object, flags: int, *rest: object, **named: object) -> int:
        seen.append(flags)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    return seen


def test_a_flipped_byte_in_any_section_is_detected(store: Store) -> None:
    layout = store.manifest.layouts_of(1)[0]
    entry = store.manifest.layers[1].experts[5]
    path = store.shard_of(ExpertId(1, 5))
    sections = {section.name: section for section in layout.sections}
    assert list(sections) == ["scales", "plane0", "plane1", "plane2"]
    for name, section in sections.items():
        for place in (section.offset, section.offset + section.length - 1):
            flip(path, entry.offset + place)
            source = DiskSource(store)
            with pytest.raises(CorruptExpertError, match=rf"{path.name}: layer 1 expert 5: section {name} differs"):
                source.read(ExpertId(1, 5), slot_of(store))
            source.read(ExpertId(1, 4), slot_of(store))
            source.read(ExpertId(1, 6), slot_of(store))
            source.close()
            with pytest.raises(CorruptExpertError, match="layer 1 expert 5"):
                verify(store)
            flip(path, entry.offset + place)
    verify(store)


def test_a_corrupt_expert_is_never_marked_as_checked(store: Store) -> None:
    """Refused again at the second read, and accepted once its bytes are restored."""
    path, entry = store.shard_of(ExpertId(0, 0)), store.manifest.layers[0].experts[0]
    flip(path, entry.offset)
    source = DiskSource(store)
    for _ in range(2):
        with pytest.raises(CorruptExpertError):
            source.read(ExpertId(0, 0), slot_of(store))
    flip(path, entry.offset)
    source.read(ExpertId(0, 0), slot_of(store))
    source.close()


def test_checksums_are_compared_at_the_first_read_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = xxhash.xxh3_64_hexdigest

    def counting(data: bytes | memoryview) -> str:
        calls.append(len(data))
        return real(data)

    monkeypatch.setattr(xxhash, "xxh3_64_hexdigest", counting)
    source = by_python(store)
    for _ in range(3):
        source.read(ExpertId(0, 3), slot_of(store))
    assert len(calls) == 4, "one for each section"
    source.read(ExpertId(0, 4), slot_of(store))
    assert len(calls) == 8
    source.close()


def test_a_shard_that_is_written_to_while_in_use_is_checked_again(store: Store) -> None:
    source, slot, expert = DiskSource(store), slot_of(store), ExpertId(1, 2)
    source.read(expert, slot)
    shard = store.shard_of(expert)
    os.utime(shard)
    source.read(expert, slot)
    flip(shard, store.manifest.layers[1].experts[2].offset)
    for _ in range(2):
        with pytest.raises(CorruptExpertError, match="layer 1 expert 2"):
            source.read(expert, slot)
    source.read(ExpertId(0, 0), slot)
    source.close()


def test_embedding_rows_that_are_written_to_while_in_use_are_checked_again(store: Store) -> None:
    name = "model.embed_tokens.weight"
    entry = read_header(store.path / "dense.safetensors")[name]
    layout = blob_layout("int8", {"weight": (128, 64)}, "F32") if entry.dtype == "U8" else None
    rows = StoredRows(store, name, (128, 64), layout)
    rows.read([3])
    os.utime(store.path / "dense.safetensors")
    rows.read([3])
    flip(store.path / "dense.safetensors", entry.offset + 70)
    with pytest.raises(StoreError, match="differ from their checksum"):
        rows.read([3])


def test_a_truncated_blob_is_an_error(store: Store) -> None:
    path = store.shard_of(ExpertId(0, 7))
    source = DiskSource(store)
    for lost in (1, 4096, 5000):
        os.truncate(path, path.stat().st_size - lost)  # after opening, which would have refused it
        with pytest.raises(StoreError, match=rf"{path.name}: layer 0 expert 7 ends after \d+ of"):
            source.read(ExpertId(0, 7), slot_of(store))
    source.close()
    path.unlink()
    with pytest.raises(StoreError, match=f"{path.name} cannot be opened"):
        DiskSource(store)


def test_a_failing_disk_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    source = by_python(store)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StoreError, match=r"layer 1 expert 2 cannot be read \(Input/output error"):
        source.read(ExpertId(1, 2), slot_of(store))
    with pytest.raises(StoreError, match=r"dense\.safetensors cannot be read"):
        load_dense(store)
    source.close()


def test_refused_direct_reads_are_logged_once(
    store: Store, fresh_process: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = slot_of(store)
    source = DiskSource(store)
    source.read(ExpertId(1, 1), expected)
    source.close()
    assert not caplog.records
    flags = refuse_direct(monkeypatch)
    got = slot_of(store)
    with caplog.at_level(logging.WARNING):
        source = DiskSource(store)
        source.read(ExpertId(1, 1), got)
        source.close()
        load_dense(store)
        verify(store)
    assert any(flag & os.O_DIRECT for flag in flags), "nothing was refused"
    assert bytes(got) == bytes(expected)
    assert [record.message.split(" for ")[0] for record in caplog.records] == ["O_DIRECT is not supported"]
    assert "page cache" in caplog.text


def test_a_read_that_is_refused_falls_back_too(
    store: Store, fresh_process: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some file systems accept the flag at open and refuse it at reads."""
    real = os.preadv
    refused: list[int] = []

    def refusing(handle: int, *rest: object) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", refusing)
    source = by_python(store)
    with ThreadPoolExecutor(4) as threads, caplog.at_level(logging.WARNING):
        slots = [slot_of(store) for _ in range(16)]
        list(threads.map(lambda i: source.read(ExpertId(i // 8, i % 8), slots[i]), range(16)))
    assert 1 <= len(refused) <= 8, "at most one for each thread and file"
    assert len(caplog.records) == 1
    source.close()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_tmpfs(store: Store) -> None:
    """Newer kernels accept O_DIRECT there, older ones refuse it; the bytes are the same."""
    copy = Path("/dev/shm") / f"fate-test-{os.getpid()}"
    shutil.copytree(store.path, copy)
    try:
        verify(open_store(copy))
    finally:
        shutil.rmtree(copy)


def test_reads_bypass_the_page_cache(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    real = os.open

    def recording(path: str, flag: int, *rest: int) -> int:
        flags.append(flag)
        return real(path, flag, *rest)

    monkeypatch.setattr(os, "open", recording)
    source = DiskSource(store)
    source.close()
    buffered = DiskSource(store, direct=False)
    buffered.read(ExpertId(0, 0), slot_of(store))
    buffered.close()
    assert [bool(flag & os.O_DIRECT) for flag in flags] == [True, True, False, False]


@given(blocks=st.integers(0, 6), tail=st.integers(0, 4095), offset=st.integers(0, 7), room=st.integers(1, 8), direct=st.booleans())
@settings(deadline=None, max_examples=60)
def test_direct_file_reads_what_the_file_has(
    tmp_path_factory: pytest.TempPathFactory, blocks: int, tail: int, offset: int, room: int, direct: bool
) -> None:
    data = os.urandom(blocks * 4096 + tail)
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(data)
    file = DirectFile(path, direct)
    memory = memoryview(anonymous_buffer(room * 4096))
    got = file.read(memory, offset * 4096)
    expected = data[offset * 4096 : (offset + room) * 4096]
    assert got == len(expected)
    assert bytes(memory[:got]) == expected
    file.close()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may return fewer bytes than requested, and not only multiples of 4096."""
    data = os.urandom(5 * 4096 + 100)
    (tmp_path / "file").write_bytes(data)
    real, requests = os.preadv, []

    def short(handle: int, buffers: list[memoryview], offset: int) -> int:
        requests.append((len(buffers[0]), offset))
        return min(real(handle, buffers, offset), 4096 + 700 if len(requests) % 2 else 4096)

    monkeypatch.setattr(os, "preadv", short)
    file = DirectFile(tmp_path / "file")
    memory = memoryview(anonymous_buffer(6 * 4096))
    assert file.read(memory, 0) == len(data)
    assert bytes(memory[: len(data)]) == data
    assert all(offset % 4096 == 0 for _, offset in requests)
    file.close()
