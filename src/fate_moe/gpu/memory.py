"""The two places experts live in below the disk: a pinned arena in host memory, and slots in VRAM."""

from __future__ import annotations

from typing import Any

import torch

from fate_moe.errors import FateError
from fate_moe.memory.slots import SlotArena

__all__ = ["PinnedArena", "VramPool"]

# Registered in pieces of about this size: one long registration would hold the driver's lock for seconds.
_SLAB_BYTES = 1 << 30


class PinnedArena:
    """``num_blobs`` blobs of ``blob_bytes`` each in host memory, page-locked where there is a GPU, allocated once.

    ``bytes`` is all of it as a uint8 tensor, ``blob(i)`` one of them, ``slots`` the same for those who read from disk. The device
    reads it at the host's own addresses.
    """

    def __init__(self, num_blobs: int, blob_bytes: int, device: torch.device) -> None:
        self.num_blobs, self.blob_bytes = num_blobs, blob_bytes
        self.slots = SlotArena((num_blobs, blob_bytes))
        self.bytes = torch.frombuffer(self.slots.buffer, dtype=torch.uint8)
        self._registered: list[int] = []
        if device.type == "cuda":
            slab = max(1, _SLAB_BYTES // blob_bytes) * blob_bytes
            for start in range(0, self.bytes.numel(), slab):
                self._register(self.bytes.data_ptr() + start, min(slab, self.bytes.numel() - start))

    def _register(self, address: int, num_bytes: int) -> None:
        mapped_and_portable = 3
        error = _driver().cudaHostRegister(address, num_bytes, mapped_and_portable)
        if int(error) != 0:
            raise FateError(
                f"the driver refused to page-lock {num_bytes >> 20} MiB ({error}); raise the memlock limit or lower --ram"
            )
        self._registered.append(address)

    def blob(self, number: int) -> torch.Tensor:
        """The bytes of blob ``number``, uint8 [blob_bytes]."""
        return self.bytes[number * self.blob_bytes : (number + 1) * self.blob_bytes]

    def close(self) -> None:
        """Unlock the pages; nothing on the device may be reading them."""
        for address in self._registered:
            _driver().cudaHostUnregister(address)
        self._registered.clear()


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class VramPool:
    """``num_slots`` slots of ``slot_bytes`` for residents, then ``num_staging`` more that prefill streams through; one
    allocation."""

    def __init__(self, num_slots: int, num_staging: int, slot_bytes: int, device: torch.device) -> None:
        self.num_slots, self.num_staging, self.slot_bytes = num_slots, num_staging, slot_bytes
        self.bytes = torch.empty((num_slots + num_staging) * slot_bytes, dtype=torch.uint8, device=device)

    def slot(self, number: int) -> torch.Tensor:
        """The bytes of slot ``number``, uint8 [slot_bytes]; staging slots come after the residents'."""
        return self.bytes[number * self.slot_bytes : (number + 1) * self.slot_bytes]
