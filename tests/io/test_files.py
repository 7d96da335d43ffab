"""Writing to places that forbid it, have no room, or know no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fate_moe.errors import DiskSpaceError, StoreError
from fate_moe.io.files import atomic_file, is_writable, locked_folder


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "precious")
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(shared: bool) -> None:
        with atomic_file(tmp_path / "file", shared) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    for shared in (False, True):
        with pytest.raises(KeyboardInterrupt):
            interrupted(shared)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(DiskSpaceError, match="the disk is full"), atomic_file(tmp_path / "file"):
            failing(number)()
    assert not list(tmp_path.iterdir())


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def write(data: bytes) -> None:
        with atomic_file(tmp_path / "file", shared=True) as file:
            both.wait(10)
            file.write(data)
            both.wait(10)

    threads = [threading.Thread(target=write, args=(data,)) for data in (b"one" * 1000, b"two" * 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in (b"one" * 1000, b"two" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_and_folder_syncs_works(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    with locked_folder(tmp_path / "store"), atomic_file(tmp_path / "store" / "file") as file:
        file.write(b"data")
    assert (tmp_path / "store" / "file").read_bytes() == b"data"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "store", tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(StoreError, match=r"cannot be made \(.*\); choose another folder"), locked_folder(place):
            pass


def test_where_files_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert is_writable(tmp_path)
    assert is_writable(tmp_path / "a" / "b")
    assert not is_writable(tmp_path / "file")
    assert not is_writable(tmp_path / "file" / "a")
