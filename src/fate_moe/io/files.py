"""Atomic files, a lock on a folder, and a journal of finished files."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fate_moe.errors import DiskSpaceError, StoreError
from fate_moe.io.bounded import load_json
from fate_moe.io.direct import drop_from_page_cache
from fate_moe.units import format_bytes

__all__ = ["Journal", "atomic_file", "is_writable", "lock", "locked_folder", "require_space", "sync_folder"]

_log = logging.getLogger(__name__)

_LEFT_SECONDS = 3600  # without a write: nobody goes on with it

# What file systems say to fsync of a folder and to flock where they have neither (NFS, SMB, FUSE).
_UNSUPPORTED = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def atomic_file(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write that appears at ``path`` complete and on the disk, or not at all.

    ``shared``: several processes may write it at once, and the last one's stays. Its bytes do not stay in the page cache. Raises
    DiskSpaceError when the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp" if shared else path.name + ".tmp")
    if shared:
        _drop_leftovers(path)
    try:
        if os.path.lexists(temporary):  # what a killed process left, or a link that leads elsewhere
            temporary.unlink()
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
            drop_from_page_cache(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"the disk is full, {path} could not be written; free some space and run the same command again, it continues"
            ) from error
        raise
    finally:
        with suppress(OSError):  # on a read-only file system even what is missing cannot be removed
            temporary.unlink()


def _drop_leftovers(path: Path) -> None:
    """Delete what processes that were killed while they wrote ``path`` left beside it."""
    old = time.time() - _LEFT_SECONDS
    for left in path.parent.glob(f"{glob.escape(path.name)}.*-*.tmp"):
        with suppress(OSError):
            if left.lstat().st_mtime < old:
                left.unlink()


def is_writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or it can be made itself."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def sync_folder(folder: Path) -> None:
    """Sync ``folder``, so that renames within it survive a power failure; some file systems cannot, and need not."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to and not listed
        return
    try:
        _sync(handle)
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises DiskSpaceError, with both amounts, when the disk of ``folder`` has less than ``num_bytes`` free."""
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < num_bytes:
        raise DiskSpaceError(
            f"{folder} needs {format_bytes(num_bytes)} and {format_bytes(free)} are free; free some space or choose another disk"
        )


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create ``folder`` if it does not exist and hold its lock; waits, with a log line, while another process holds it.

    The lock is on the folder itself and ends with the process. The holder may rename or remove the folder; a process that waited
    then creates a new one. Raises StoreError where it cannot be made.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be made ({error.strerror}); choose another folder (FATE_HOME, or the one given)"
            ) from error
        try:
            if not lock(handle):
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


def lock(handle: int) -> bool:
    """Lock the open file ``handle`` until it is closed; False where another process has it. True on file systems without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _log.info("the file system has no locks (%s); nothing else may write there meanwhile", error.strerror)
    return True


class Journal:
    """A list of the finished files in ``folder``. Opening it with another ``identity`` deletes all files and starts anew."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / "journal.json"
        self._data: dict[str, Any] = {"identity": identity, "files": {}}
        try:
            data = load_json(self.path)
            valid = all(type(entry["bytes"]) is int and "result" in entry for entry in data["files"].values())
            same = data["identity"] == identity
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # no journal of ours: the files may belong to someone else, so none is deleted
        if same and valid:
            self._data = data
        elif not same:
            # The journal last, so that a killed process repeats this.
            for path in sorted(folder.iterdir(), key=lambda path: path == self.path):
                path.unlink()

    def finished(self, name: str) -> Any:
        """The result recorded for the file ``name``, or None if the file must be written."""
        entry = self._data["files"].get(name)
        path = self.path.with_name(name)
        complete = entry is not None and path.exists() and path.stat().st_size == entry["bytes"]
        return entry["result"] if complete else None

    def record(self, name: str, result: Any) -> None:
        """Record that the file ``name`` is finished, with a ``result`` (JSON) for ``finished`` to return."""
        num_bytes = self.path.with_name(name).stat().st_size
        self._data["files"][name] = {"bytes": num_bytes, "result": result}
        self._write()

    def _write(self) -> None:
        with atomic_file(self.path) as file:
            file.write(json.dumps(self._data).encode())
