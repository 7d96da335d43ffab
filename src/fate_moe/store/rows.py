"""The one dense matrix of which a forward pass needs a few rows only, its tokens' embeddings: left on disk, read by row."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch

from fate_moe.core import BlobLayout
from fate_moe.errors import StoreError
from fate_moe.io.tensorfile import read_header
from fate_moe.quant.dtypes import TORCH_DTYPES
from fate_moe.store.open import Store

__all__ = ["StoredRows"]

_AGAIN = "delete the store and convert the checkpoint again"


class StoredRows:
    """Rows of the tensor ``name`` [R, C] of a store's dense.safetensors: of its ``weight``, or of the parts of its blob.

    Reads go through the page cache, which gives pages back when memory is short: nothing of the matrix counts as resident. Its
    bytes are those that ``load_dense`` compared with their checksum, unless somebody writes to the file while it is in use.
    """

    def __init__(self, store: Store, name: str, shape: tuple[int, ...], layout: BlobLayout | None) -> None:
        """``layout``: of the blob, should it be one. Raises StoreError where the file has no such tensor of this shape."""
        self.path = store.path / "dense.safetensors"
        try:
            entry = read_header(self.path)[name]
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except KeyError as error:
            raise StoreError(f"{self.path}: dense.safetensors lacks {name}; {_AGAIN}") from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path} cannot be read ({error}); {_AGAIN}") from error
        self._file = file
        weakref.finalize(self, os.close, file)
        self.layout = layout if layout and (entry.dtype, entry.length) == ("U8", layout.length) else None
        if self.layout is None and entry.shape != shape:
            raise StoreError(f"{self.path}: {name} is {entry.shape} in dense.safetensors, config.json means {shape}; {_AGAIN}")
        parts = [(part.name, part.dtype, part.shape, part.offset) for part in self.layout.parts] if self.layout else []
        self._parts = [
            (part, TORCH_DTYPES[dtype], tuple(of[1:]), entry.offset + offset)
            for part, dtype, of, offset in parts or [("weight", entry.dtype, entry.shape, 0)]
        ]

    def read(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Rows ``ids`` of every part, [len(ids), ...]. Raises StoreError when they cannot be read whole."""
        read = {}
        for name, dtype, shape, offset in self._parts:
            rows = torch.empty(len(ids), *shape, dtype=dtype)
            length = rows[0].nbytes
            memory = memoryview(rows.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]
            for place, row in enumerate(ids):
                self._fill(memory[place * length : (place + 1) * length], offset + row * length)
            read[name] = rows
        return read

    def _fill(self, row: memoryview, offset: int) -> None:
        try:
            got = os.preadv(self._file, [row], offset)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read ({error.strerror}); check the disk") from error
        if got < len(row):
            raise StoreError(f"{self.path} ends before byte {offset + len(row)}; it is torn, {_AGAIN}")
