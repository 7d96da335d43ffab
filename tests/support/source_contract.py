"""What every expert source keeps to (core.ExpertSource)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from fate_moe.core import SLOT_ALIGNMENT, ExpertId, ExpertSource
from fate_moe.errors import CorruptExpertError, StoreError
from fate_moe.memory.slots import SlotArena

__all__ = ["check_errors", "check_source"]


def check_source(source: ExpertSource, blobs: Mapping[ExpertId, bytes], ends: Sequence[int]) -> None:
    """``source`` brings ``blobs``, whose sections end at ``ends``, whole and in parts, to one thread and to many. Closes it."""
    longest = max(map(len, blobs.values()))
    arena = SlotArena((len(blobs), longest + SLOT_ALIGNMENT))
    for expert, blob in blobs.items():
        slot = arena.view(0)
        slot[:] = b"\xaa" * len(slot)
        assert source.read(expert, slot) == len(blob), "says how many bytes it read"
        assert bytes(slot[: len(blob)]) == blob
        assert set(slot[len(blob) :]) == {0xAA}, "writes nothing beyond the blob"
    _check_sections(source, blobs, ends, arena)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            views = [arena.view(slot) for slot in range(len(blobs))]
            list(pool.map(source.read, blobs, views))
            assert all(bytes(view[: len(blob)]) == blob for view, blob in zip(views, blobs.values(), strict=True))
    source.close()
    arena.close()


def _check_sections(source: ExpertSource, blobs: Mapping[ExpertId, bytes], ends: Sequence[int], arena: SlotArena) -> None:
    """Every run of sections, and all of them one by one into one slot."""
    numbers = range(len(ends))
    for expert, blob in list(blobs.items())[:2]:
        slot = arena.view(0)
        for first in numbers:
            for last in (*range(first + 1, len(ends)), None):
                slot[:] = b"\xaa" * len(slot)
                start, stop = ends[first - 1] if first else 0, ends[last - 1] if last else len(blob)
                num_bytes = source.read(expert, slot, first, last)
                assert stop - start <= num_bytes <= len(blob)
                assert bytes(slot[start:stop]) == blob[start:stop]
                others = [at for at in (*range(start), *range(stop, len(blob))) if slot[at] not in (0xAA, blob[at])]
                assert not others, "a neighbour's bytes may come along, never others"
                assert set(slot[len(blob) :]) == {0xAA}
        slot[:] = bytes(len(slot))
        for first, last in pairwise([*numbers, None]):
            assert first is not None
            source.read(expert, slot, first, last)
            held = ends[last - 1] if last else len(blob)
            assert bytes(slot[:held]) == blob[:held], "what the slot held stays"


def check_errors(source: ExpertSource, damaged: ExpertId, whole: ExpertId, blob: bytes, error: type[StoreError]) -> None:
    """``damaged`` cannot be read, which ``error`` says; ``whole`` still is ``blob``. Closes ``source``."""
    assert issubclass(error, StoreError)
    arena = SlotArena((1, -(-len(blob) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT))
    with pytest.raises(StoreError, match=f"layer {damaged.layer} expert {damaged.expert}") as raised:
        source.read(damaged, arena.view(0))
    assert isinstance(raised.value, CorruptExpertError) == issubclass(error, CorruptExpertError)
    source.read(whole, arena.view(0))
    assert bytes(arena.view(0)[: len(blob)]) == blob
    source.close()
