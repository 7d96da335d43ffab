"""A block on the disk is whole and the one that was asked for, or it is not there; the folder stays within its bound."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fate_moe.io.files import lock
from fate_moe.schedule import block_files
from fate_moe.schedule.block_files import BlockFiles

MODEL, OTHER = "a" * 32, "b" * 32
SIZE = 64 + 32  # of a block, in two parts
FILE = len(f"fate kv 1 {MODEL} bf16 {SIZE} {'0' * 32}\n") + 16 + SIZE


def files_in(home: Path, most: int = 1 << 20, model: str = MODEL, form: str = "bf16") -> BlockFiles:
    return BlockFiles(home, model, form, SIZE, most)


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def parts(number: int) -> list[memoryview]:
    data = Random(number).randbytes(SIZE)
    return [memoryview(bytearray(data[:64])), memoryview(bytearray(data[64:]))]


def found(files: BlockFiles, number: int) -> bool:
    """Whether block ``number`` is there; it must be the right one then."""
    into = parts(-1 - number)
    there = files.read(name(number), into)
    assert not there or into == parts(number)
    return there


def bytes_in(home: Path) -> int:
    return sum(path.stat().st_size for path in home.rglob("*") if path.is_file() and path.name != "lock")


def test_what_was_written_is_read_by_another_process_and_by_nobody_else(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    assert files.write(name(1), 0, parts(1))
    assert found(files_in(tmp_path), 1)
    assert not found(files_in(tmp_path), 2)
    assert not found(files_in(tmp_path, model=OTHER), 1)
    assert not found(files_in(tmp_path, form="int8"), 1), "another format"
    assert (tmp_path / MODEL).stat().st_mode & 0o077 == 0, "keys and values tell what was said"
    assert [path.stat().st_size for path in (tmp_path / MODEL).iterdir()] == [], "what is not this block is removed"


def test_a_file_that_is_not_whole_is_not_there_and_goes(tmp_path: Path) -> None:
    dice = Random(1)
    files = files_in(tmp_path)
    for _ in range(60):
        files.write(name(1), 0, parts(1))
        files.write(name(2), 0, parts(2))
        path = tmp_path / MODEL / f"{name(1).hex()}.kv"
        data = bytearray(path.read_bytes())
        assert len(data) == FILE
        kind, at = dice.randrange(5), dice.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data += dice.randbytes(1 + at)
        elif kind == 3:
            data[at:] = bytes(len(data) - at)
            data[at - 1] ^= 1  # what was there may have been zeros
        else:
            data = bytearray((tmp_path / MODEL / f"{name(2).hex()}.kv").read_bytes())  # another block's, whole
        path.write_bytes(data)
        assert not found(files_in(tmp_path), 1)
        assert not path.exists()
    path.symlink_to("/dev/zero")
    assert not found(files_in(tmp_path), 1)


def test_of_what_was_used_longest_ago_the_deepest_goes_first(tmp_path: Path) -> None:
    files = files_in(tmp_path, most=10 * FILE)
    for depth in range(6):
        files.write(name(depth), 100 - depth, parts(depth))
    for depth in range(4):
        files.write(name(10 + depth), 200 - depth, parts(10 + depth))
    for depth in range(6):
        assert files.use(name(depth), 300 - depth)
    files.write(name(20), 400, parts(20))
    assert [number for number in (*range(6), *range(10, 14), 20) if found(files, number)] == [0, 1, 2, 3, 4, 5, 10, 11, 12, 20]
    assert bytes_in(tmp_path) <= 10 * FILE


def test_several_writers_stay_within_the_bound_and_find_each_others_blocks(tmp_path: Path) -> None:
    most, over = 12 * FILE, list[int]()

    def write(model: str, seed: int) -> None:
        files, dice = files_in(tmp_path, most, model), Random(seed)
        for _ in range(60):
            number = dice.randrange(30)
            if not files.use(name(number), 0):
                files.write(name(number), 0, parts(number))
            if (taken := bytes_in_now(tmp_path)) > most:
                over.append(taken)
            found(files, number)

    threads = [threading.Thread(target=write, args=(model, seed)) for seed, model in enumerate((MODEL, MODEL, OTHER))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not over
    assert bytes_in(tmp_path) > most // 2
    assert not list(tmp_path.rglob("*.tmp"))


def bytes_in_now(home: Path) -> int:
    """As ``bytes_in``, while nobody writes."""
    handle = os.open(home / "lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return bytes_in(home)
    finally:
        os.close(handle)


def test_while_another_process_writes_it_is_tried_again_later(tmp_path: Path) -> None:
    files, other = files_in(tmp_path), files_in(tmp_path)
    files.write(name(1), 0, parts(1))
    handle = os.open(tmp_path / "lock", os.O_RDWR)
    assert lock(handle)
    assert not other.write(name(2), 0, parts(2))
    os.close(handle)
    assert other.write(name(2), 0, parts(2))
    assert found(files, 2)


def test_what_a_killed_process_left_counts_and_goes_in_time(tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir()
    left = tmp_path / MODEL / f"{name(1).hex()}.kv.123-456.tmp"
    left.write_bytes(bytes(3 * FILE))
    (tmp_path / MODEL / "notes.txt").write_text("of a person")
    files = files_in(tmp_path, most=5 * FILE)
    files.write(name(2), 0, parts(2))
    assert files.num_bytes == 4 * FILE
    os.utime(left, (1, 1))
    files_in(tmp_path, most=5 * FILE).write(name(3), 0, parts(3))
    assert not left.exists()
    assert (tmp_path / MODEL / "notes.txt").exists()


@pytest.mark.parametrize("failure", ["full", "quota", "read-only", "too large"])
def test_a_disk_that_takes_nothing_is_said_once(
    tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files_in(tmp_path).write(name(1), 0, parts(1))
    files = files_in(tmp_path, most=FILE - 1 if failure == "too large" else 1 << 20)

    def fail(*arguments: Any) -> Any:
        raise OSError(errno.EROFS if failure == "read-only" else errno.EDQUOT, "it cannot be")

    if failure == "full":
        monkeypatch.setattr(block_files, "_LEFT_FREE", 1 << 60)
    elif failure == "quota":
        monkeypatch.setattr(block_files, "_write_whole", fail)
    elif failure == "read-only":
        monkeypatch.setattr(os, "open", fail)
    with caplog.at_level(logging.WARNING):
        assert files.write(name(2), 0, parts(2))
    assert len(caplog.records) == 1
    assert not files.is_writing
    monkeypatch.undo()
    assert not found(files, 2)
    assert found(files, 1) or failure == "too large", "what is there is still read"
    assert not list(tmp_path.rglob("*.tmp"))
