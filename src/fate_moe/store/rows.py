"""The embedding, left on disk: a forward pass needs only the rows of its tokens and reads them one by one."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch

from fate_moe.core import BlobLayout
from fate_moe.errors import StoreError
from fate_moe.io.direct import file_state
from fate_moe.io.tensorfile import read_header
from fate_moe.quant.dtypes import TORCH_DTYPES
from fate_moe.store.format import AGAIN
from fate_moe.store.open import Store, check_dense

__all__ = ["StoredRows"]


class StoredRows:
    """Rows of the tensor ``name`` [R, C] of a store's dense.safetensors: of its ``weight``, or of the parts of its blob.

    Reads go through the page cache, which the system can reclaim, so the matrix does not count as resident memory. The bytes are
    those that ``load_dense`` compared with their checksum; once the file was written to they are compared again.
    """

    def __init__(self, store: Store, name: str, shape: tuple[int, ...], layout: BlobLayout | None) -> None:
        """``layout`` is the blob's, if the tensor is stored as one. Raises StoreError if the file has no such tensor."""
        self.path = store.path / "dense.safetensors"
        try:
            entry = read_header(self.path)[name]
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except KeyError as error:
            raise StoreError(f"{self.path} lacks {name}; {AGAIN}") from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path} cannot be read ({error}); {AGAIN}") from error
        self._store, self._file, self._state = store, file, file_state(file)
        weakref.finalize(self, os.close, file)
        self.layout = layout if layout and (entry.dtype, entry.length) == ("U8", layout.length) else None
        if self.layout is None and entry.shape != shape:
            raise StoreError(f"{self.path}: {name} has shape {entry.shape}; config.json expects {shape}; {AGAIN}")
        parts = [(part.name, part.dtype, part.shape, part.offset) for part in self.layout.parts] if self.layout else []
        self._parts = [
            (part, TORCH_DTYPES[dtype], tuple(part_shape[1:]), entry.offset + offset)
            for part, dtype, part_shape, offset in parts or [("weight", entry.dtype, entry.shape, 0)]
        ]

    def read(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Rows ``ids`` of every part, [len(ids), ...]. Raises StoreError when they cannot be read completely, or were changed."""
        parts = {}
        for name, dtype, shape, offset in self._parts:
            rows = torch.empty(len(ids), *shape, dtype=dtype)
            length = rows[0].nbytes
            memory = memoryview(rows.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]
            for place, row in enumerate(ids):
                self._fill(memory[place * length : (place + 1) * length], offset + row * length)
            parts[name] = rows
        if (state := file_state(self._file)) != self._state:
            check_dense(self._store)
            self._state = state
        return parts

    def _fill(self, row: memoryview, offset: int) -> None:
        try:
            got = os.preadv(self._file, [row], offset)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read ({error.strerror}); check the disk") from error
        if got < len(row):
            raise StoreError(f"{self.path} ends before byte {offset + len(row)}; the file is incomplete, {AGAIN}")
