"""Digests of whole files, with a list on disk of those already made, so that an unchanged file is not read again."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

from fate_moe.errors import FateError
from fate_moe.io.bounded import load_json
from fate_moe.io.direct import drop_from_page_cache
from fate_moe.io.files import atomic_file

__all__ = ["KnownDigests"]

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_MOST_FILES = 4096  # a checkpoint has up to a few hundred
# A file that changed this recently may change again without a difference in its times: some file systems count in seconds.
_SETTLED_NS = 2_000_000_000

Facts = list[int]  # size, modification and change time in ns, inode


class KnownDigests:
    """The digests of files, kept in the JSON file ``path``: a file is read again once its size, times or inode differ.

    The change time is among them because ``touch -d`` and ``rsync -t`` set the modification time to what it was. A list that cannot
    be read is started anew; one that cannot be written costs the next process the same reading. Not thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[Facts, str]] = {}
        with suppress(OSError, ValueError, TypeError, AttributeError):
            for name, (facts, digest) in load_json(path).items():
                if type(digest) is str and type(facts) is list:
                    self._known[name] = facts, digest

    def get(self, file: Path) -> str | None:
        """The digest of ``file`` if it is known. Raises OSError if there is no such file."""
        facts, digest = self._known.get(os.path.realpath(file), ([], None))
        return digest if facts == _facts(os.stat(file)) else None

    def make(self, file: Path, advance: Callable[[int], None]) -> str:
        """The digest (xxh3_128, hex) of the bytes of ``file``, which do not stay in the page cache.

        ``advance`` is told how many bytes each part had. Raises OSError when it cannot be read.
        """
        digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
        with open(file, "rb", buffering=0) as opened:
            before, done = os.fstat(opened.fileno()), 0
            while got := opened.readinto(buffer):
                digest.update(buffer[:got])
                drop_from_page_cache(opened, done, got)
                done += got
                advance(got)
            after = os.fstat(opened.fileno())
        name, facts = os.path.realpath(file), _facts(after)
        self._known.pop(name, None)
        if facts == _facts(before) and time.time_ns() - max(facts[1:3]) > _SETTLED_NS:
            self._known[name] = facts, digest.hexdigest()  # at the end: the newest
        return digest.hexdigest()

    def save(self) -> None:
        """Keep the newest for later processes."""
        newest = dict(list(self._known.items())[-_MOST_FILES:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path, shared=True) as file:
                file.write(json.dumps(newest).encode())
        except (OSError, FateError) as error:
            _log.info("digests of the weights cannot be kept, the next load reads them again: %s", error)


def _facts(status: os.stat_result) -> Facts:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
