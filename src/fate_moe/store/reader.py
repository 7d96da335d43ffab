"""Experts from disk to slots."""

from __future__ import annotations

from fate_moe.core import ExpertId
from fate_moe.store.open import Store, check_blob, open_file, read_blob

__all__ = ["DiskSource"]


class DiskSource:
    """An ExpertSource that reads whole blobs from a store's shards, with O_DIRECT unless ``direct`` is false or it is refused.

    Each expert's checksums are compared at its first read in this object's life. Any number of threads may read at once.
    """

    def __init__(self, store: Store, direct: bool = True) -> None:
        """Opens every shard. Raises StoreError naming one that cannot be opened."""
        self.store = store
        self._files = {shard: open_file(store.path / shard, direct) for shard in store.manifest.shard_bytes}
        self._verified: set[ExpertId] = set()

    def read(self, expert: ExpertId, slot: memoryview) -> int:
        """Fill ``slot`` (page-aligned, at least the blob's length) and return the bytes read.

        Raises StoreError if the bytes cannot be read whole, CorruptExpertError if they differ from their checksum; both name file,
        layer and expert.
        """
        layer = self.store.manifest.layers[expert.layer]
        blob = slot[: self.store.manifest.layouts[layer.layout].length]
        read_blob(self.store, self._files[layer.shard], expert, blob)
        if expert not in self._verified:
            check_blob(self.store, expert, blob)
            self._verified.add(expert)
        return len(blob)

    def close(self) -> None:
        """Close the shards; no read may follow."""
        for file in self._files.values():
            file.close()
