"""The arena: slots in one buffer, equal ones or of several lengths."""

from __future__ import annotations

import pytest

from fate_moe.memory.slots import SlotArena

SLOT = 4096


def test_arena() -> None:
    arena = SlotArena((3, SLOT))
    arena.view(1)[:] = b"\x07" * SLOT
    assert bytes(arena.buffer[SLOT : 2 * SLOT]) == b"\x07" * SLOT
    assert bytes(arena.view(0)) == bytes(arena.view(2)) == bytes(SLOT)
    with pytest.raises(IndexError):
        arena.view(3)
    for classes in ([(0, SLOT)], [(1, 0)], [(1, 100)], [], [(1, SLOT), (0, 2 * SLOT)], [(1, SLOT), (1, SLOT)]):
        with pytest.raises(ValueError, match="at least one slot"):
            SlotArena(*classes)
    arena.close()


def test_slots_of_several_lengths_share_the_buffer() -> None:
    arena = SlotArena((2, SLOT), (1, 3 * SLOT), (2, 4 * SLOT))
    assert arena.num_slots == 5
    assert arena.class_of == [0, 0, 1, 2, 2]
    assert [len(arena.view(slot)) // SLOT for slot in range(5)] == [1, 1, 3, 4, 4]
    for slot in range(5):
        arena.view(slot)[:] = bytes([slot]) * len(arena.view(slot))
    assert arena.buffer[:] == b"".join(bytes([slot]) * len(arena.view(slot)) for slot in range(5)), "each its own bytes, no gaps"
    assert [arena.class_for(pages * SLOT) for pages in (1, 2, 3, 4)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="do not fit"):
        arena.class_for(5 * SLOT)
    with pytest.raises(ValueError, match="short ones first"):
        SlotArena((1, 2 * SLOT), (1, SLOT))
    arena.close()
