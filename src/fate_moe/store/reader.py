"""Reads experts from disk into slots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fate_moe.core import SLOT_ALIGNMENT, ExpertId
from fate_moe.io.direct import DirectFile
from fate_moe.kernels.extension import native
from fate_moe.machine import allow_open_files
from fate_moe.store.format import AGAIN
from fate_moe.store.open import Store, check_section, open_file, read_blob

__all__ = ["DiskSource"]


class DiskSource:
    """An ExpertSource that reads blobs from a store's shards, with O_DIRECT unless ``direct`` is false or the file system refuses.

    Each section is compared with its checksum the first time that this object reads it, and again once its file was written to.
    Any number of threads may read at once. ``native`` (None: it is not built) is the extension's part: it reads these files without
    the interpreter.
    """

    def __init__(self, store: Store, direct: bool = True) -> None:
        """Opens every shard. Raises StoreError naming one that cannot be opened."""
        self.store = store
        allow_open_files(len(store.manifest.shard_bytes))
        self._files: dict[str, DirectFile] = {}
        try:
            for shard in store.manifest.shard_bytes:
                self._files[shard] = open_file(store.path / shard, direct)
        except BaseException:
            self.close()
            raise
        self._states = {shard: file.state() for shard, file in self._files.items()}
        self._verified: set[tuple[ExpertId, int]] = set()  # (expert, section)
        self.native: Any = None if native is None else self._make_native()

    def read(self, expert: ExpertId, slot: memoryview, first: int = 0, last: int | None = None) -> int:
        """Read sections ``first:last`` (None: to the blob's end) to their places in ``slot`` and return the number of bytes read.

        ``slot`` is page-aligned and has at least the blob's length; whole blocks of 4096 bytes are read. Raises StoreError if a
        section cannot be read completely, CorruptExpertError if it differs from its checksum; both name file, layer and expert.
        """
        if self.native is not None:
            return int(self.native.read(expert, slot, first, last))
        manifest = self.store.manifest
        layout = manifest.layout_of(expert)
        sections = layout.sections[first:last]
        start = sections[0].offset // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        stop = layout.length
        if sections[-1] != layout.sections[-1]:
            stop = -(-(sections[-1].offset + sections[-1].length) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        shard = manifest.layers[expert.layer].shard
        read_blob(self.store, self._files[shard], expert, slot[start:stop], start)
        if (state := self._files[shard].state()) != self._states[shard]:
            of_others = {(one, number) for one, number in self._verified.copy() if manifest.layers[one.layer].shard != shard}
            self._verified, self._states[shard] = of_others, state
        for number in range(first, first + len(sections)):
            if (expert, number) not in self._verified:
                check_section(self.store, expert, slot, number)
                self._verified.add((expert, number))
        return stop - start

    def _make_native(self) -> Any:
        """It holds the files, not this object, which holds it."""
        manifest, files = self.store.manifest, list(self._files.values())
        number_of = {shard: number for number, shard in enumerate(self._files)}
        layouts = [([(one.offset, one.length) for one in layout.sections], layout.length) for layout in manifest.layouts]
        places = [
            [
                (index, number_of[layer.shard], expert.offset, [int(one, 16) for one in expert.checksums])
                for expert, index in zip(layer.experts, layer.layouts, strict=True)
            ]
            for layer in manifest.layers
        ]
        return native.DiskSource.make(
            partial(_check, self.store),
            partial(_reopen, files),
            layouts,
            places,
            [str(file.path) for file in files],
            [file.fileno() for file in files],
            [file.direct for file in files],
            AGAIN,
        )

    def close(self) -> None:
        """Close the shards; do not read afterwards."""
        for file in self._files.values():
            file.close()


def _check(store: Store, layer: int, expert: int, blob: memoryview, section: int) -> None:
    check_section(store, ExpertId(layer, expert), blob, section)


def _reopen(files: Sequence[DirectFile], number: int) -> int:
    files[number].fall_back()
    return files[number].fileno()
