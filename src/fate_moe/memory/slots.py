"""Room for experts: one anonymous mapping, cut into slots."""

from __future__ import annotations

import contextlib
import mmap
from bisect import bisect_left
from itertools import accumulate

__all__ = ["SlotArena"]


class SlotArena:
    """Page-aligned buffers, the slots, numbered from 0. A page becomes resident memory when it is first written.

    Slots may be of several lengths, the *classes*, numbered from 0 by ascending length; one class's slots lie together. The mapping
    is private: shared anonymous memory would be shmem, which control groups count differently and can swap.
    """

    def __init__(self, *classes: tuple[int, int]) -> None:
        """``classes``: (number of slots, bytes of each) by ascending bytes, which must be multiples of 4096, so that every slot can
        be the target of a direct read."""
        lengths = [slot_bytes for _, slot_bytes in classes]
        if not classes or lengths != sorted(set(lengths)) or any(n < 1 or b < 1 or b % mmap.PAGESIZE for n, b in classes):
            raise ValueError(f"slots of {classes}: at least one slot of each length and whole pages are needed, short ones first")
        self.num_slots = sum(num_slots for num_slots, _ in classes)
        self.class_bytes = lengths
        self.class_of = [number for number, (num_slots, _) in enumerate(classes) for _ in range(num_slots)]  # by slot
        *self.offsets, end = accumulate((lengths[number] for number in self.class_of), initial=0)  # of slots in ``buffer``
        self.buffer = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # kernels read slots faster; a Linux kernel built without them says EINVAL
                self.buffer.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self.buffer)

    def class_for(self, num_bytes: int) -> int:
        """The class of the shortest slots that have ``num_bytes``. Raises ValueError if none have."""
        if num_bytes > self.class_bytes[-1]:
            raise ValueError(f"{num_bytes} bytes do not fit into a slot of {self.class_bytes[-1]}")
        return bisect_left(self.class_bytes, num_bytes)

    def view(self, slot: int) -> memoryview:
        """The bytes of ``slot``, writable. Raises IndexError if there is no such slot."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        start = self.offsets[slot]
        return self._memory[start : start + self.class_bytes[self.class_of[slot]]]

    def close(self) -> None:
        """Give the memory back: at once, or when the last tensor on it is gone."""
        self._memory.release()
        with contextlib.suppress(BufferError):
            self.buffer.close()
