"""Files that are whole or absent, a folder that one process at a time works in, and a memory of what is done."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fate_moe.errors import DiskSpaceError
from fate_moe.io.direct import drop_from_page_cache
from fate_moe.units import format_bytes

__all__ = ["Journal", "atomic_file", "locked_folder", "require_space", "sync_folder"]

_log = logging.getLogger(__name__)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under ``path`` whole and on the disk, or not at all.

    What was written does not stay in the page cache. Raises DiskSpaceError when the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            drop_from_page_cache(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"the disk is full: {path} could not be written; free space and give the same command again, it continues"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make renames within ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises DiskSpaceError when the disk of ``folder`` has less than ``num_bytes`` free, saying both amounts."""
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < num_bytes:
        raise DiskSpaceError(
            f"{folder} needs {format_bytes(num_bytes)} and {format_bytes(free)} are free; make room or choose another disk"
        )


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` if need be and hold its lock; waits (and says so) while another process has it.

    The lock is the folder's own and dies with the process. The holder may rename or remove the folder: who waited makes a new one.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("another conversion is writing %s; waiting for it to end", folder)
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                ours = os.path.samestat(os.stat(folder), os.fstat(handle))
            except FileNotFoundError:
                ours = False
            if ours:
                yield
                return
        finally:
            os.close(handle)


class Journal:
    """Remembers, file by file, what is finished in ``folder``; a change of ``identity`` forgets (and deletes) everything."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / "journal.json"
        self._data: dict[str, Any] = {"identity": identity, "files": {}}
        try:
            found = json.loads(self.path.read_bytes())
            whole = all(type(entry["bytes"]) is int and "result" in entry for entry in found["files"].values())
            same = found["identity"] == identity
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # without a journal of ours the folder may be anybody's
        if same and whole:
            self._data = found
        elif not same:
            for path in sorted(folder.iterdir(), key=lambda path: path == self.path):  # journal last: a killed one goes on here
                path.unlink()

    def finished(self, name: str) -> Any:
        """What ``record`` was told about the file ``name``, or None if it has to be written."""
        entry = self._data["files"].get(name)
        path = self.path.with_name(name)
        whole = entry is not None and path.exists() and path.stat().st_size == entry["bytes"]
        return entry["result"] if whole else None

    def record(self, name: str, result: Any) -> None:
        """The file ``name`` is whole; ``result`` (JSON) is what its writing found out."""
        num_bytes = self.path.with_name(name).stat().st_size
        self._data["files"][name] = {"bytes": num_bytes, "result": result}
        self._write()

    def _write(self) -> None:
        with atomic_file(self.path) as file:
            file.write(json.dumps(self._data).encode())
