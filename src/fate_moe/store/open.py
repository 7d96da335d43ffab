"""Opens a store. Everything is checked here except the experts' bytes, which are checked when they are first read."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import nn

from fate_moe.core import SLOT_ALIGNMENT, BlobLayout, ExpertId
from fate_moe.errors import CorruptExpertError, StoreError
from fate_moe.io.bounded import read_bounded
from fate_moe.io.direct import DirectFile, anonymous_buffer
from fate_moe.io.progress import progress_bar
from fate_moe.io.tensorfile import TensorEntry, data_start, parse_header, read_header
from fate_moe.quant.dtypes import TORCH_DTYPES
from fate_moe.store.dense import DenseEncoder, dense_layouts
from fate_moe.store.format import AGAIN, Manifest, blob_layout

__all__ = [
    "Store",
    "check_blob",
    "check_dense",
    "check_section",
    "dense_entries",
    "load_dense",
    "open_store",
    "stored_layouts",
    "unquantized",
    "verify",
]

# Large enough for the full bandwidth of a disk, small enough to stay in the processor's cache for the checksum.
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Store:
    """An expert store with a valid manifest, whose files have the names, lengths and headers that the manifest lists."""

    path: Path
    manifest: Manifest

    def shard_of(self, expert: ExpertId) -> Path:
        """The file that holds ``expert``'s blob."""
        return self.path / self.manifest.layers[expert.layer].shard


def open_store(path: str | Path) -> Store:
    """Open the store in folder ``path``; reads fate.json and the header of every file, nothing more.

    Raises StoreError, naming the file, if a file is missing, truncated or of another version, or if the folder is not a store.
    """
    path = Path(path)
    try:
        _check_entries(path)
        text = read_bounded(path / "fate.json")
    except FileNotFoundError as error:
        raise StoreError(f"{path} is not an expert store (no fate.json); make one with: fate convert CHECKPOINT {path}") from error
    except OSError as error:
        raise StoreError(f"{path / 'fate.json'} cannot be read ({error.strerror}); check its permissions and the disk") from error
    store = Store(path, Manifest.from_json(text, str(path / "fate.json")))
    if not (path / "config.json").is_file():
        raise StoreError(f"{path / 'config.json'} is missing; copy it from the checkpoint")
    _header(path / "dense.safetensors", store.manifest.dense_bytes)
    entries = {shard: _header(path / shard, length) for shard, length in store.manifest.shard_bytes.items()}
    for layer in store.manifest.layers:
        for number, (expert, index) in enumerate(zip(layer.experts, layer.layouts, strict=True)):
            entry = entries[layer.shard].get(f"{layer.name}.{number}")
            if entry is None or (entry.offset, entry.length) != (expert.offset, store.manifest.layouts[index].length):
                raise StoreError(f"{path / layer.shard}: {layer.name} expert {number} is not where fate.json says; {AGAIN}")
    return store


def _check_entries(folder: Path) -> None:
    """Raise StoreError for what no store has: pipes, devices, and links that leave the folder.

    The links of a snapshot in the hub's cache lead to the blobs beside it.
    """
    home = os.path.realpath(folder)
    allowed = [home]
    if os.path.basename(os.path.dirname(home)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
    with os.scandir(folder) as entries:
        for entry in entries:
            where = os.path.realpath(entry.path)
            if entry.is_symlink() and not any(os.path.commonpath([where, place]) == place for place in allowed):
                raise StoreError(f"{entry.path} is a link that leaves the store; put the file itself there, or {AGAIN}")
            if not (entry.is_file() or entry.is_dir() or entry.is_symlink()):
                raise StoreError(f"{entry.path} is a pipe or a device, which no store has; {AGAIN}")


def _header(path: Path, num_bytes: int) -> dict[str, TensorEntry]:
    try:
        actual = path.stat().st_size
        if actual != num_bytes:
            raise StoreError(f"{path} has {actual} bytes, fate.json says {num_bytes}; the file is incomplete, {AGAIN}")
        entries = read_header(path)
        if odd := next((entry for entry in entries.values() if entry.dtype not in TORCH_DTYPES), None):
            raise ValueError(f"{odd.name[:80]} has the dtype {odd.dtype[:20]!r}")
        return entries
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); {AGAIN}") from error


def dense_entries(store: Store) -> dict[str, TensorEntry]:
    """The tensors of dense.safetensors by name. Raises StoreError if its header cannot be read."""
    return _header(store.path / "dense.safetensors", store.manifest.dense_bytes)


def stored_layouts(store: Store, model: nn.Module) -> dict[str, BlobLayout]:
    """``dense_layouts`` for ``store``; of a blob that an older version wrote with fewer bits the layout that it has."""
    precision, entries = store.manifest.dense_precision, dense_entries(store)
    layouts = dense_layouts(model, precision)
    for name, layout in layouts.items():
        entry, older = entries.get(name), blob_layout(precision, {"weight": tuple(model.get_parameter(name).shape)}, "BF16")
        if entry is not None and (entry.dtype, entry.length) == ("U8", older.length) and layout != older:
            layouts[name] = older
    return layouts


def unquantized(store: Store, model: nn.Module, layouts: Mapping[str, BlobLayout]) -> dict[str, BlobLayout]:
    """Those of ``layouts`` (see ``stored_layouts``) whose matrix the store of an older version has as numbers.

    Only 8-bit ones: their codes are those of a conversion, whatever its solver was.
    """
    found = {}
    for name, entry in dense_entries(store).items():
        layout, is_number = layouts.get(name), TORCH_DTYPES[entry.dtype].is_floating_point
        if layout is None or layout.plane_widths != (8,) or not is_number:
            continue
        if entry.shape == tuple(model.get_parameter(name).shape):
            found[name] = layout
    return found


def load_dense(
    store: Store, exclude: str | None = None, quantize: Mapping[str, BlobLayout] | None = None
) -> dict[str, torch.Tensor]:
    """All tensors except the routed experts and the tensor ``exclude``, by the model's parameter names.

    The file is read once, past the page cache, into one private buffer; all tensors are views of it. Those in ``quantize`` (see
    ``unquantized``) become blobs of that layout, strip by strip. Resident memory grows by the file's length, less the pages of
    ``exclude`` and of numbers that became blobs. Raises StoreError when the bytes differ from their checksum.
    """
    path, num_bytes = store.path / "dense.safetensors", store.manifest.dense_bytes
    buffer = anonymous_buffer(num_bytes)
    memory = memoryview(buffer)
    found = dense_entries(store)
    excluded = found.get(exclude) if exclude else None
    strips = [_Strips(found[name], layout, buffer) for name, layout in (quantize or {}).items() if name != exclude]

    def done(start: int, end: int) -> None:
        if excluded is not None:
            _give_back(buffer, max(start, excluded.offset), min(end, excluded.offset + excluded.length))
        for one in strips:
            one.read_to(end)

    _checked_read(path, num_bytes, store.manifest.dense_checksum, memory, done=done)
    try:
        start = data_start(bytes(memory[:8]), num_bytes)
        entries = parse_header(bytes(memory[8:start]), num_bytes)
        if any(entries.get(entry.name) != entry for entry in (*filter(None, [excluded]), *(one.entry for one in strips))):
            raise ValueError("its header changed while it was read")
        blobs = {one.entry.name: one.encoder.blob for one in strips}
        return {name: blobs[name] if name in blobs else _view(buffer, entry) for name, entry in entries.items() if name != exclude}
    except (ValueError, KeyError) as error:
        raise StoreError(f"{path} is damaged ({error}); {AGAIN}") from error


class _Strips:
    """A matrix of numbers that becomes a blob while the file is read into ``buffer``."""

    def __init__(self, entry: TensorEntry, layout: BlobLayout, buffer: mmap.mmap) -> None:
        self.entry, self.encoder = entry, DenseEncoder(layout)
        self._buffer, self._given_back = buffer, entry.offset

    def read_to(self, end: int) -> None:
        """The file has been read up to ``end``: encode the rows that are whole now, and give their pages back."""
        entry, dtype = self.entry, TORCH_DTYPES[self.entry.dtype]
        rows, cols = entry.shape
        first, row_bytes = self.encoder.rows, cols * dtype.itemsize
        whole = min(rows, max(0, end - entry.offset) // row_bytes)
        if whole > first:
            place = entry.offset + first * row_bytes
            self.encoder.add(torch.frombuffer(self._buffer, dtype=dtype, count=(whole - first) * cols, offset=place).view(-1, cols))
            self._given_back = _give_back(self._buffer, self._given_back, entry.offset + whole * row_bytes)


def _give_back(buffer: mmap.mmap, start: int, end: int) -> int:
    """Return the pages wholly between ``start`` and ``end`` to the system; where the next call goes on."""
    begin, end = -(-start // SLOT_ALIGNMENT) * SLOT_ALIGNMENT, end // SLOT_ALIGNMENT * SLOT_ALIGNMENT
    if begin >= end:
        return start
    buffer.madvise(mmap.MADV_DONTNEED, begin, end - begin)
    return end


def check_dense(store: Store) -> None:
    """Raise StoreError when the bytes of dense.safetensors differ from their checksum, or cannot be read."""
    memory = memoryview(anonymous_buffer(_CHUNK_BYTES))
    _checked_read(store.path / "dense.safetensors", store.manifest.dense_bytes, store.manifest.dense_checksum, memory, reuse=True)


def _view(buffer: object, entry: TensorEntry) -> torch.Tensor:
    dtype = TORCH_DTYPES[entry.dtype]
    if entry.length == 0:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=entry.length // dtype.itemsize, offset=entry.offset).view(entry.shape)


def verify(store: Store, progress: bool | None = None) -> None:
    """Read every byte of the store and compare it with its checksum.

    ``progress`` draws a bar (None: if stderr is a terminal). Raises CorruptExpertError naming file, layer and expert, StoreError
    for dense.safetensors or a file that cannot be read.
    """
    manifest = store.manifest
    memory = memoryview(anonymous_buffer(manifest.slot_bytes))
    with progress_bar("verifying", manifest.dense_bytes + manifest.expert_bytes, progress) as advance:
        check_dense(store)
        advance(manifest.dense_bytes)
        for number, layer in enumerate(manifest.layers):
            with closing(open_file(store.path / layer.shard)) as file:
                for index, layout in enumerate(manifest.layouts_of(number)):
                    blob = memory[: layout.length]
                    read_blob(store, file, ExpertId(number, index), blob)
                    check_blob(store, ExpertId(number, index), blob)
                    advance(len(blob))


def open_file(path: Path, direct: bool = True) -> DirectFile:
    """Open a file of a store for reading. Raises StoreError when it cannot be opened."""
    try:
        return DirectFile(path, direct)
    except OSError as error:
        advice = {
            errno.EMFILE: "close what is not used (model.fate.close()), or raise the limit (ulimit -n)",
            errno.ENFILE: "close other programs",
            errno.EACCES: "check its permissions",
        }
        raise StoreError(f"{path} cannot be opened ({error.strerror}); {advice.get(error.errno or 0, AGAIN)}") from error


def read_blob(store: Store, file: DirectFile, expert: ExpertId, blob: memoryview, start: int = 0) -> None:
    """Fill ``blob`` with ``expert``'s bytes from ``start`` on. Raises StoreError when they cannot be read completely."""
    offset = store.manifest.layers[expert.layer].experts[expert.expert].offset + start
    where = f"{file.path}: layer {expert.layer} expert {expert.expert}"
    try:
        got = file.read(blob, offset)
    except OSError as error:
        raise StoreError(f"{where} cannot be read ({error.strerror}); check the disk, then {AGAIN}") from error
    if got < len(blob):
        raise StoreError(f"{where} ends after {got} of {len(blob)} bytes; the file is incomplete, {AGAIN}")


def check_blob(store: Store, expert: ExpertId, blob: memoryview) -> None:
    """Compare ``blob`` with ``expert``'s checksums, section by section. Raises CorruptExpertError naming file, layer and expert."""
    for number in range(len(store.manifest.layout_of(expert).sections)):
        check_section(store, expert, blob, number)


def check_section(store: Store, expert: ExpertId, blob: memoryview, number: int) -> None:
    """Compare section ``number`` alone; the rest of ``blob`` may hold anything. Raises CorruptExpertError if it differs."""
    section = store.manifest.layout_of(expert).sections[number]
    checksum = store.manifest.layers[expert.layer].experts[expert.expert].checksums[number]
    if xxhash.xxh3_64_hexdigest(blob[section.offset : section.offset + section.length]) != checksum:
        where = f"{store.shard_of(expert)}: layer {expert.layer} expert {expert.expert}"
        raise CorruptExpertError(f"{where}: section {section.name} differs from its checksum; {AGAIN}")


def _checked_read(
    path: Path,
    num_bytes: int,
    checksum: str,
    memory: memoryview,
    reuse: bool = False,
    done: Callable[[int, int], None] = lambda start, end: None,
) -> None:
    """Read the whole file in chunks into ``memory`` (with ``reuse``, each into its start) and compare it with ``checksum``.

    ``done(start, end)`` is called after each chunk. Raises StoreError when the file cannot be read or its bytes differ.
    """
    digest = xxhash.xxh3_64()
    with closing(open_file(path)) as file:
        for start in range(0, num_bytes, _CHUNK_BYTES):
            room = memory[:_CHUNK_BYTES] if reuse else memory[start : start + _CHUNK_BYTES]
            length = min(_CHUNK_BYTES, num_bytes - start)
            try:
                got = file.read(room, start)
            except OSError as error:
                raise StoreError(f"{path} cannot be read ({error.strerror}); check the disk") from error
            if got < length:
                raise StoreError(f"{path} ends after {start + got} of {num_bytes} bytes; the file is incomplete, {AGAIN}")
            digest.update(room[:length])
            done(start, start + length)
    if digest.hexdigest() != checksum:
        raise StoreError(f"{path}: its bytes differ from their checksum; {AGAIN}")
