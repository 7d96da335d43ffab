"""Reads past the page cache: a file's bytes go to the caller's memory and nowhere else."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import threading
from pathlib import Path
from typing import BinaryIO

from fate_moe.core import SLOT_ALIGNMENT

__all__ = ["DirectFile", "anonymous_buffer", "drop_from_page_cache", "file_state"]

_log = logging.getLogger(__name__)
_fallback_logged = threading.Event()
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only; elsewhere reads are buffered


def file_state(fd: int) -> tuple[int, int]:
    """(size, time of the last write in ns) of an open file. While they stay, its bytes are taken to be unchanged."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


class DirectFile:
    """A file opened with O_DIRECT if the file system supports it, else buffered (logged once per process).

    Any number of threads may ``read`` at once. Offsets, lengths and memory of direct reads must be multiples of 4096.
    """

    def __init__(self, path: Path, direct: bool = True) -> None:
        """Raises OSError when the file cannot be opened."""
        self.path = path
        self._lock = threading.Lock()
        self.direct = direct and _O_DIRECT != 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (_O_DIRECT if self.direct else 0))
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.direct = False
            self._log_fallback()
        self._open = [self._fd]

    def read(self, memory: memoryview, offset: int) -> int:
        """Fill ``memory`` (bytes, page-aligned) from ``offset`` on; returns the number of bytes, smaller only at the file's end.

        Raises OSError when the device fails.
        """
        done = 0
        while done < len(memory):
            direct = self.direct
            try:
                got = os.preadv(self._fd, [memory[done:]], offset + done)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                self.fall_back()
                continue
            done += got
            if got == 0:
                break
            if direct and done % SLOT_ALIGNMENT and done < len(memory):
                # The next read must start at a multiple of 4096: go back to one, unless the file ends here.
                if offset + done >= os.fstat(self._fd).st_size:
                    break
                done -= done % SLOT_ALIGNMENT
        return done

    def fileno(self) -> int:
        """The descriptor that is read from now; those before stay open until ``close``."""
        return self._fd

    def state(self) -> tuple[int, int]:
        """See ``file_state``."""
        return file_state(self._fd)

    def close(self) -> None:
        """Close the file; further reads fail."""
        while self._open:
            os.close(self._open.pop())

    def fall_back(self) -> None:
        """Read through the page cache from now on."""
        with self._lock:
            if self.direct:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                self._open.append(self._fd)  # other threads may still be reading through the first one
                self.direct = False
                self._log_fallback()

    def _log_fallback(self) -> None:
        if not _fallback_logged.is_set():
            _fallback_logged.set()
            _log.warning("O_DIRECT is not supported for %s (is it on tmpfs?); stores are read through the page cache", self.path)


def drop_from_page_cache(file: BinaryIO, offset: int = 0, length: int = 0) -> None:
    """Drop ``file``'s bytes (``length`` 0: up to the end) from the page cache, so that they do not evict other files."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def anonymous_buffer(num_bytes: int) -> mmap.mmap:
    """Zeroed private memory, page-aligned, of ``num_bytes`` rounded up to 4096; a page becomes resident when it is written.

    Uses huge pages if the system has them, because weights that are read once a token would otherwise evict all other entries of
    the processor's TLB.
    """
    length = max(1, -(-num_bytes // SLOT_ALIGNMENT)) * SLOT_ALIGNMENT
    buffer = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # EINVAL from a kernel built without huge pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
