"""The arena: equal slots in one buffer."""

from __future__ import annotations

import pytest

from fate_moe.memory.slots import SlotArena

SLOT = 4096


def test_arena() -> None:
    arena = SlotArena(3, SLOT)
    arena.view(1)[:] = b"\x07" * SLOT
    assert bytes(arena.buffer[SLOT : 2 * SLOT]) == b"\x07" * SLOT
    assert bytes(arena.view(0)) == bytes(arena.view(2)) == bytes(SLOT)
    with pytest.raises(IndexError):
        arena.view(3)
    for num_slots, slot_bytes in ((0, SLOT), (1, 0), (1, 100)):
        with pytest.raises(ValueError, match="slots of"):
            SlotArena(num_slots, slot_bytes)
    arena.close()
