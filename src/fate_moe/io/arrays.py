"""Reads .npz files that may be anything: sizes are checked before memory is taken, and nothing is unpickled. No torch."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fate_moe.io.bounded import open_regular

__all__ = ["load_arrays"]

_MOST_ARRAYS = 1000
_MOST_RATIO = 64  # unpacked to packed bytes; arrays of zeros, such as predictions that were not made, come to about 20


def load_arrays(path: Path, most_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file by name, of at most ``most_bytes``, or 64 times the file's length if that is more.

    Raises OSError where it cannot be read, ValueError for anything else that is wrong with it.
    """
    with open_regular(path) as opened:
        try:
            _check(opened, most_bytes)
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                return {name: np.asarray(file[name]) for name in file.files}
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:  # whatever a damaged file makes zipfile, zlib and numpy raise
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _check(opened: BinaryIO, most_bytes: int) -> None:
    """Raise ValueError where the archive is not one of arrays, or would unpack to too much."""
    most_bytes = max(most_bytes, _MOST_RATIO * os.fstat(opened.fileno()).st_size)
    with zipfile.ZipFile(opened) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(names) > _MOST_ARRAYS or len(set(names)) < len(names) or not all(name.endswith(".npy") for name in names):
            raise ValueError("it holds something other than arrays")
        if (total := sum(member.file_size for member in members)) > most_bytes:
            raise ValueError(f"it unpacks to {total} bytes, and at most {most_bytes} are expected")
        for member in members:
            with archive.open(member) as part:
                if _array_bytes(part) > member.file_size:
                    raise ValueError(f"{member.filename} ends early")


def _array_bytes(part: IO[bytes]) -> int:
    """What the header of an array says that follows it."""
    version = npy.read_magic(part)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array of version {version}")
    shape, _, dtype = read(part)
    if dtype.hasobject or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"an array of {dtype} {shape}")
    return math.prod(shape) * max(1, dtype.itemsize)
