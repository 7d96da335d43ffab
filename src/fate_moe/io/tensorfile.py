"""Reads and writes safetensors files one tensor at a time; headers are untrusted and checked.

The safetensors package maps whole files, and mapped pages count as this process's memory. A conversion must stay small, and the
tensors of a store's files must start on a 4096-byte boundary, so the format is implemented here: 8 bytes of header length, a JSON
header (padded with spaces), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_moe.core import SLOT_ALIGNMENT
from fate_moe.io.bounded import open_regular
from fate_moe.quant.dtypes import TORCH_DTYPES

__all__ = ["TensorEntry", "data_start", "parse_header", "place_tensors", "read_header"]

# The limit of the safetensors package itself.
_MAX_HEADER_BYTES = 100_000_000
_LONGEST_DTYPE = 32  # characters
_MOST_DIMENSIONS = 16  # torch has no use for more; the product of millions of huge ones would take hours


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: ``dtype`` is a safetensors name, ``offset`` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a file by name, in file order.

    Raises OSError when the file cannot be read, and ValueError with the reason when it is not a complete safetensors file.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        start = data_start(file.read(8), num_bytes)
        return parse_header(file.read(start - 8), num_bytes)


def data_start(first: bytes, num_bytes: int) -> int:
    """The offset of the tensors, from a file's first 8 bytes. Raises ValueError if a file of ``num_bytes`` cannot be complete."""
    if len(first) < 8:
        raise ValueError("too short to be a safetensors file")
    header_length = int.from_bytes(first, "little")
    if not 2 <= header_length <= _MAX_HEADER_BYTES:
        raise ValueError("not a safetensors file")
    if 8 + header_length > num_bytes:
        raise ValueError(f"truncated: the file has {num_bytes} bytes and its header ends at {8 + header_length}")
    return 8 + header_length


def parse_header(text: bytes, num_bytes: int) -> dict[str, TensorEntry]:
    """Every tensor of a file of ``num_bytes`` with the header ``text`` (without its 8 bytes of length). Raises ValueError."""
    start = 8 + len(text)
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
        header.pop("__metadata__", None)
        entries = sorted((_entry(name, fields, start) for name, fields in header.items()), key=lambda e: (e.offset, e.length))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a safetensors file ({' '.join(str(error).split())[:200]})") from error
    end = start
    for entry in entries:
        if entry.offset != end:
            raise ValueError(f"not a safetensors file (tensor {entry.name} at {entry.offset} instead of {end})")
        end += entry.length
    if end != num_bytes:
        raise ValueError(f"truncated or extended: the file has {num_bytes} bytes and its header lists tensors up to {end}")
    return {entry.name: entry for entry in entries}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return made


def _entry(name: str, fields: dict[str, Any], start: int) -> TensorEntry:
    dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or len(dtype) > _LONGEST_DTYPE or not dtype.isprintable():
        raise ValueError(f"tensor {name} has the dtype {str(dtype)[:80]}")
    if len(shape) > _MOST_DIMENSIONS or any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has shape {str(shape)[:80]} at {begin}..{end}")
    if dtype in TORCH_DTYPES and math.prod(shape) * TORCH_DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"tensor {name} of {dtype} {shape} has {end - begin} bytes")
    return TensorEntry(name, dtype, tuple(shape), start + begin, end - begin)


def place_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[TensorEntry]]:
    """The header of a file of ``tensors`` (name, dtype, shape), in this order, and the place of each in the file.

    The header is padded with spaces so that the tensors start on a multiple of 4096.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT - 8
    header = struct.pack("<Q", length) + text.ljust(length)
    return header, list(parse_header(text.ljust(length), len(header) + begin).values())
