"""Blocks of KV caches as files that any number of processes share. At the bound the oldest are removed; a file that is not
whole counts as missing.

    HOME/lock                   held while a process writes; its bytes say who wrote last
    HOME/MODEL/NAME.kv          a block: a line of text, the digest of line and block (xxh3, 128 bits), the block

MODEL is the digest of all that the bits of keys and values depend on besides tokens, NAME that of the tokens up to the block's end
(schedule/prefixes.py); both are in the line, so a file under another name is foreign. A block is as many bytes as its format says;
nothing in a file is parsed. Files are not synced: the digest shows one that a power failure tore. A file's modification time is
when its block was last used. Of one text the last block is removed first, so a later block is given an earlier time.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from fate_moe.io.bounded import open_regular
from fate_moe.io.files import lock
from fate_moe.units import format_bytes

__all__ = ["BlockFiles"]

_log = logging.getLogger(__name__)

_DIGEST_BYTES = 16
_MODEL, _NAME = re.compile("[0-9a-f]{32}"), re.compile(r"[0-9a-f]{32}\.kv(\.[0-9-]+\.tmp)?")
_FILLED = 0.95  # of the bound, once old blocks are removed: each removal lists all files
_LEFT_FREE = 256 << 20  # of the disk, for others
_LEFT_SECONDS = 60  # a temporary file of this age is of a process that was killed


class BlockFiles:
    """Blocks of ``model`` (32 hexadecimal digits) under ``home``, of ``block_bytes`` each in the format called ``form``. All
    models' files take ``most_bytes`` at most. Used from one thread of each process.

    No method raises OSError. The first failure to write is a warning, and nothing is written any more.
    """

    def __init__(self, home: Path, model: str, form: str, block_bytes: int, most_bytes: int) -> None:
        self.read_bytes = self.written_bytes = 0
        self.num_bytes = 0  # of all models' files, when this process last wrote
        self.last_written = 0.0  # time.monotonic()
        self.is_writing = True
        self._home, self._folder = home, home / model
        self._line, self._block_bytes, self._most = f"fate kv 1 {model} {form} {block_bytes} ", block_bytes, most_bytes
        self._last_writer = b""

    def path_of(self, name: bytes) -> str:
        """Of the file of block ``name``, under ``home``."""
        return f"{self._folder.name}/{name.hex()}.kv"

    def read(self, name: bytes, into: Sequence[memoryview]) -> bool:
        """Fill ``into``, ``block_bytes`` in all, with block ``name``. False: it is not there, and ``into`` may be overwritten.

        A file that is not this block whole is removed.
        """
        head = self._head(name)
        found = memoryview(bytearray(len(head) + _DIGEST_BYTES))
        try:
            with open_regular(path := self._path(name)) as file:
                size = os.fstat(file.fileno()).st_size
                whole = size == len(found) + self._block_bytes and _fill(file.fileno(), [found, *into])
        except OSError:
            return False
        if not whole or found[: len(head)] != head or found[len(head) :] != _digest(head, into):
            _log.info("%s is not whole, or not what its name says, and is removed", path)
            with suppress(OSError):
                path.unlink()
            return False
        self.read_bytes += self._block_bytes
        return True

    def has(self, name: bytes) -> bool:
        """Whether there is a file of block ``name``, which may not be whole."""
        return os.path.exists(self._path(name))

    def use(self, name: bytes, used: int) -> bool:
        """Block ``name`` was used at ``used`` (Unix time in ns); whether it is there."""
        try:
            os.utime(self._path(name), ns=(used, used))
        except FileNotFoundError:
            return False
        except OSError:  # read-only
            pass
        return True

    def write(self, name: bytes, used: int, parts: Sequence[memoryview]) -> bool:
        """Write block ``name``: ``parts`` one after the other. False: another process is writing, try again later."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # texts of people can be told from keys and values
            handle = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if not lock(handle):
                    return False
                self._write(handle, name, used, parts)
            finally:
                os.close(handle)
        except OSError as error:
            self.stop(f"{self._home}: {error.strerror}")
        return True

    def stop(self, reason: str) -> None:
        """Write nothing any more, and say so."""
        if self.is_writing:
            self.is_writing = False
            _log.warning("prefixes are no longer kept on the disk (%s); --prefix-cache-disk off turns this message off", reason)

    def _write(self, handle: int, name: bytes, used: int, parts: Sequence[memoryview]) -> None:
        """Under the lock, whose file is ``handle``."""
        head = self._head(name)
        size = len(head) + _DIGEST_BYTES + self._block_bytes
        if not self._last_writer or os.pread(handle, 64, 0) != self._last_writer:
            self.num_bytes = sum(taken for _, taken, _ in self._listing())
        if self.num_bytes + size > self._most and not self._make_room(size):
            self.stop(f"{format_bytes(self._most)} hold no block of {format_bytes(size)}")
            return
        facts = os.statvfs(self._home)
        if facts.f_bavail * facts.f_frsize < size + _LEFT_FREE:
            self.stop(f"the disk of {self._home} is full")
            return
        self._last_writer = os.urandom(16).hex().encode()
        os.pwrite(handle, self._last_writer, 0)
        path = self._path(name)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        with suppress(FileNotFoundError):
            temporary.unlink()
        try:
            with open(temporary, "xb", buffering=0, opener=_private) as file:
                for part in [memoryview(head), memoryview(_digest(head, parts)), *parts]:
                    _write_whole(file.fileno(), part)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        self.use(name, used)
        self.num_bytes += size
        self.last_written = time.monotonic()
        self.written_bytes += self._block_bytes

    def _make_room(self, size: int) -> bool:
        """Remove the blocks that were used longest ago until one of ``size`` fits; whether it does."""
        files = sorted(self._listing())
        self.num_bytes = sum(taken for _, taken, _ in files)
        wanted = min(self._most - size, int(_FILLED * self._most))
        for _, taken, path in files:
            if self.num_bytes <= wanted:
                break
            with suppress(OSError):
                os.unlink(path)
                self.num_bytes -= taken
        return self.num_bytes + size <= self._most

    def _listing(self) -> list[tuple[int, int, str]]:
        """(last used in ns, bytes, path) of all models' blocks; what killed processes left is removed."""
        found, now = [], time.time()
        for folder in _entries(self._home, _MODEL):
            entries = _entries(folder, _NAME)
            for entry in entries:
                with suppress(OSError):  # another process's may go meanwhile
                    facts = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(".tmp") and facts.st_mtime < now - _LEFT_SECONDS:
                        os.unlink(entry)
                        continue
                    found.append((facts.st_mtime_ns, facts.st_size, entry.path))
            if not entries and folder.name != self._folder.name:
                with suppress(OSError):  # of a model, or a version, that nobody runs any more
                    os.rmdir(folder)
        return found

    def _path(self, name: bytes) -> Path:
        return self._folder / f"{name.hex()}.kv"

    def _head(self, name: bytes) -> bytes:
        return f"{self._line}{name.hex()}\n".encode()


def _entries(folder: os.PathLike[str], pattern: re.Pattern[str]) -> list[os.DirEntry[str]]:
    """What is in ``folder`` with a name of ``pattern``; nothing of one that is gone."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return [entry for entry in entries if pattern.fullmatch(entry.name)]
    return []


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _digest(head: bytes, parts: Sequence[memoryview]) -> bytes:
    digest = xxhash.xxh3_128(head)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _write_whole(handle: int, left: memoryview) -> None:
    while left:
        left = left[os.write(handle, left) :]


def _fill(handle: int, into: Sequence[memoryview]) -> bool:
    """Fill ``into`` from the start of the file; False if the file is shorter."""
    place = 0
    for part in into:
        left = part
        while left:
            if not (got := os.preadv(handle, [left], place)):
                return False
            place += got
            left = left[got:]
    return True
