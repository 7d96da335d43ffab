"""Reads files that may be anything: regular ones only, up to a size, and without waiting for whoever writes a pipe. No torch."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["MOST_JSON_BYTES", "load_json", "open_regular", "read_bounded"]

# The largest JSON files of checkpoints, tokenizers and indices of a trillion parameters, have 30 MB.
MOST_JSON_BYTES = 128 << 20


def open_regular(path: Path) -> BinaryIO:
    """``path`` opened for unbuffered reading. Raises OSError also for what is no regular file (a pipe, a device, a folder)."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "it is no regular file", str(path))
        return open(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def read_bounded(path: Path, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """All bytes of ``path``. Raises OSError also for more than ``most_bytes``, and for what is no regular file."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most_bytes:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {most_bytes} are expected", str(path))
        data = bytearray()
        while len(data) <= most_bytes and (part := file.read(most_bytes + 1 - len(data))):
            data += part
    return bytes(data)


def load_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The value in the JSON file ``path``. Raises OSError as ``read_bounded``, ValueError for all else that is wrong with it."""
    try:
        return json.loads(read_bounded(path, most_bytes))
    except UnicodeDecodeError as error:  # its own message may quote the whole file
        raise ValueError(f"it is no text at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
