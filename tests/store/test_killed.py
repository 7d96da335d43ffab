"""Conversions that are killed, fail, wait or run twice: the store appears under its name complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_moe.errors import DiskSpaceError, StoreError
from fate_moe.quant.blob import encode
from fate_moe.store import convert as convert_module
from fate_moe.store.convert import convert
from fate_moe.store.open import open_store, verify
from tests.support.checkpoints import tiny_checkpoint
from tests.support.children import Children
from tests.support.reading import snapshot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def children(checkpoint: Callable[[str], Path]) -> Iterator[Children]:
    started = Children(checkpoint("mixtral"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 MB in 5 layers: long enough to be killed in the middle."""
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 224, "num_local_experts": 8, "num_hidden_layers": 5}
    return tiny_checkpoint("mixtral", folder, **sizes)


@pytest.mark.parametrize("precision", ["lossless", "int4"])
def test_ten_kills_at_random_moments(large: Path, children: Children, tmp_path: Path, precision: str) -> None:
    undisturbed = tmp_path / "undisturbed"
    seconds = children.convert(large, undisturbed, precision=precision)["seconds"]
    store, partial = tmp_path / "store", tmp_path / "store.partial"
    dice = random.Random(7)
    kills = 0
    progress: set[object] = set()
    while kills < 10 or (len(progress) < 3 and kills < 60):  # more on a machine so busy that all came early
        pid = children.start(large, store, precision=precision)
        time.sleep(dice.uniform(0, seconds * 0.8))
        os.kill(pid, signal.SIGKILL)
        if children.wait()["status"] == 0:  # it finished before the kill: start anew
            shutil.rmtree(store)
            continue
        kills += 1
        if partial.is_dir():
            progress.add(frozenset(path.name for path in partial.iterdir()))
            with pytest.raises(StoreError):
                open_store(store)
            if not (partial / "fate.json").exists():
                with pytest.raises(StoreError, match="not an expert store"):
                    open_store(partial)
    assert len(progress) > 2, "all kills came at the same moment"
    assert children.convert(large, store, precision=precision)["status"] == 0
    assert snapshot(store) == snapshot(undisturbed)
    assert not partial.exists()


def test_a_kill_at_every_change_of_the_disk(checkpoint: Callable[[str], Path], children: Children, tmp_path: Path) -> None:
    """A kill before each fsync, rename, unlink and mkdir leaves either no store or the complete one."""
    source = checkpoint("mixtral")
    expected = snapshot(convert(source, tmp_path / "undisturbed"))
    moment = 0
    while True:
        store = tmp_path / f"store-{moment}"
        if children.convert(source, store, die_at=moment)["status"] == 0:
            break
        if store.exists():
            assert snapshot(store) == expected
        assert children.convert(source, store)["status"] == 0
        assert snapshot(store) == expected, f"killed at moment {moment}"
        assert not list(tmp_path.glob("*.partial"))
        moment += 1
    assert moment > 30  # 2 shards, dense, journal (3 times), config, generation_config, fate.json: fsync, rename, fsync each


def test_a_killed_conversion_does_not_repeat_finished_files(
    large: Path, children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, partial = tmp_path / "store", tmp_path / "store.partial"
    assert children.convert(large, store, die_at=20)["status"] == -signal.SIGKILL
    finished = set(json.loads((partial / "journal.json").read_bytes())["files"])
    assert {"dense.safetensors", "experts-00001-of-00005.safetensors"} <= finished
    assert "experts-00005-of-00005.safetensors" not in finished
    written: list[str] = []
    write_shard = convert_module._write_shard

    def recording(path: Path, *arguments: object) -> object:
        written.append(path.name)
        return write_shard(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert_module, "_write_shard", recording)
    convert(large, store)
    assert written == [
        f"experts-{i:05}-of-00005.safetensors" for i in range(1, 6) if f"experts-{i:05}-of-00005.safetensors" not in finished
    ]
    verify(open_store(store))


def test_a_partial_store_is_not_opened(large: Path, children: Children, tmp_path: Path) -> None:
    children.convert(large, tmp_path / "store", die_at=20)
    for path in (tmp_path / "store", tmp_path / "store.partial"):
        with pytest.raises(StoreError, match=r"no fate\.json"):
            open_store(path)


def test_a_finished_file_that_was_truncated_is_written_again(large: Path, children: Children, tmp_path: Path) -> None:
    expected = snapshot(convert(large, tmp_path / "undisturbed"))
    children.convert(large, tmp_path / "store", die_at=20)
    os.truncate(tmp_path / "store.partial" / "experts-00001-of-00005.safetensors", 5000)
    assert snapshot(convert(large, tmp_path / "store")) == expected


def test_another_precision_or_checkpoint_starts_anew(
    large: Path, checkpoint: Callable[[str], Path], children: Children, tmp_path: Path
) -> None:
    children.convert(large, tmp_path / "store", die_at=20)
    assert snapshot(convert(large, tmp_path / "store", "int4")) == snapshot(convert(large, tmp_path / "int4", "int4"))
    children.convert(large, tmp_path / "other", die_at=20)
    assert snapshot(convert(checkpoint("olmoe"), tmp_path / "other")) == snapshot(convert(checkpoint("olmoe"), tmp_path / "m"))


@pytest.mark.parametrize("journal", [b"", b"[]", b"{cut", b'{"identity": "x"}', b'{"identity": "x", "files": 3}'])
def test_a_damaged_journal_is_ignored(checkpoint: Callable[[str], Path], tmp_path: Path, journal: bytes) -> None:
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial" / "journal.json").write_bytes(journal)
    expected = snapshot(convert(checkpoint("mixtral"), tmp_path / "undisturbed"))
    assert snapshot(convert(checkpoint("mixtral"), tmp_path / "store")) == expected


def test_two_conversions_at_once_make_one_store(
    large: Path, checkpoint: Callable[[str], Path], children: Children, tmp_path: Path
) -> None:
    other = Children(checkpoint("mixtral"))
    for each in (children, other):
        each.start(large, tmp_path / "store")
    assert [each.wait()["status"] for each in (children, other)] == [0, 0]
    other.close()
    assert snapshot(tmp_path / "store") == snapshot(convert(large, tmp_path / "undisturbed"))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, StoreError), (errno.EMFILE, StoreError), (errno.EDQUOT, DiskSpaceError)])
def test_what_the_system_refuses_is_one_of_our_errors(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(kind, match=os.strerror(number) if name == "rename" else "continues"):
                convert(checkpoint("mixtral"), tmp_path / "store")
    verify(open_store(convert(checkpoint("mixtral"), tmp_path / "store")))
    assert not list(tmp_path.glob("*.partial"))


def test_a_conversion_continues_after_a_full_disk(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("mixtral")
    calls: list[tuple[object, ...]] = []

    def full(*arguments: object) -> bytearray:
        calls.append(arguments)
        if len(calls) == 12:
            raise OSError(28, "No space left on device")
        return encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert_module, "encode", full)
    with pytest.raises(DiskSpaceError, match=r"the disk is full.*continues"):
        convert(source, tmp_path / "store")
    assert not list((tmp_path / "store.partial").glob("*.tmp"))
    assert snapshot(convert(source, tmp_path / "store")) == snapshot(convert(source, tmp_path / "undisturbed"))
    assert len(calls) == 12 + 8 + 16, "the first layer was converted once, the second twice"
