"""How many slots of each length: one cache's bytes divided among experts whose blobs are of several lengths. No torch."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["SlotClass", "divide", "fewest", "slot_classes", "total_bytes"]


class SlotClass(NamedTuple):
    """``num_slots`` slots of ``slot_bytes`` for ``num_experts`` experts, those whose blobs have no shorter class to go to."""

    num_slots: int
    slot_bytes: int
    num_experts: int


Slots = tuple[SlotClass, ...]  # by ascending bytes


def total_bytes(slots: Slots) -> int:
    """Of all slots together."""
    return sum(of.num_slots * of.slot_bytes for of in slots)


def slot_classes(blob_bytes: Sequence[Sequence[int]], at_once: int) -> Slots:
    """A class for each length that occurs in ``blob_bytes`` (by layer and expert), with the fewest slots that will do.

    A layer may want ``at_once`` experts at once, all of one class if the class has so many of its experts.
    """
    counts = [Counter(of_layer) for of_layer in blob_bytes]
    return tuple(
        SlotClass(min(at_once, max(of[length] for of in counts)), length, sum(of[length] for of in counts))
        for length in sorted({length for of in counts for length in of})
    )


def fewest(classes: Slots, at_once: int) -> Slots:
    """The fewest bytes that will do: those of ``slot_classes``, or ``at_once`` slots that any expert fits into."""
    return min(classes, _common(classes, at_once), key=total_bytes)


def divide(num_bytes: int, classes: Slots, at_once: int) -> Slots:
    """The slots that ``num_bytes`` have room for: more of each of ``classes``, or none at all where they are too few.

    Every class has slots for the same fraction of its experts, as nearly as its fewest slots allow; so bytes go to classes in
    proportion to the bytes of their experts. What one class cannot use goes to the others. Where not even the fewest of all
    classes fit, all experts use slots that any fits into.
    """
    for smallest in (classes, _common(classes, at_once)):
        if (left := num_bytes - total_bytes(smallest)) >= 0:
            return _filled(smallest, left)
    return ()


def _filled(smallest: Slots, left: int) -> Slots:
    """More slots while ``left`` bytes have room, each for the class that has slots for the smallest fraction of its experts."""
    numbers = [of.num_slots for of in smallest]
    order = [(of.num_slots / of.num_experts, index) for index, of in enumerate(smallest)]
    heapq.heapify(order)
    while order:
        _, index = order[0]
        of = smallest[index]
        if numbers[index] == of.num_experts or of.slot_bytes > left:
            heapq.heappop(order)
            continue
        numbers[index] += 1
        left -= of.slot_bytes
        heapq.heapreplace(order, (numbers[index] / of.num_experts, index))
    return tuple(of._replace(num_slots=number) for of, number in zip(smallest, numbers, strict=True))


def _common(classes: Slots, at_once: int) -> Slots:
    return (SlotClass(at_once, classes[-1].slot_bytes, sum(of.num_experts for of in classes)),)
