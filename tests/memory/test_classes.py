"""Slots of several lengths: how many of each, and that experts of one length never wait for slots of another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.core import ExpertId, Lookup
from fate_moe.memory.classes import SlotClass, divide, fewest, slot_classes, total_bytes
from fate_moe.memory.residency import Lease, Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.registry import make_policy
from tests.memory.test_residency import layer
from tests.memory.test_residency import use as use_blobs
from tests.support.sources import MemorySource, SourceDouble, marked_blobs

SLOT = 4096
BLOBS = st.lists(st.lists(st.sampled_from([SLOT, 2 * SLOT, 5 * SLOT]), min_size=1, max_size=12), min_size=1, max_size=4)


def test_classes_of_a_store() -> None:
    blobs = [[1, 1, 1, 3], [1, 2, 2, 2], [1, 1, 3, 1]]
    assert slot_classes(blobs, 2) == (SlotClass(2, 1, 7), SlotClass(2, 2, 3), SlotClass(1, 3, 2))
    assert fewest(slot_classes(blobs, 2), 2) == (SlotClass(2, 3, 12),), "6 bytes for any two, or 9 for any two of each class"
    assert fewest(slot_classes([[1, 1, 1, 3]], 2), 2) == (SlotClass(2, 1, 3), SlotClass(1, 3, 1))


@given(num_bytes=st.integers(0, 60), num_experts=st.integers(1, 12), at_once=st.integers(1, 4))
def test_one_class_gets_what_fits(num_bytes: int, num_experts: int, at_once: int) -> None:
    at_once = min(at_once, num_experts)
    fits = min(num_experts, num_bytes // 5)
    found = divide(num_bytes, slot_classes([[5] * num_experts], at_once), at_once)
    assert found == ((SlotClass(fits, 5, num_experts),) if fits >= at_once else ())


@given(blobs=BLOBS, at_once=st.integers(1, 4), pages=st.integers(0, 250))
def test_bytes_are_divided_whole_and_no_more(blobs: list[list[int]], at_once: int, pages: int) -> None:
    at_once = min(at_once, *map(len, blobs))
    classes, num_bytes = slot_classes(blobs, at_once), pages * SLOT
    found = divide(num_bytes, classes, at_once)
    smallest = fewest(classes, at_once)
    assert bool(found) == (total_bytes(smallest) <= num_bytes)
    if not found:
        return
    assert total_bytes(found) <= num_bytes
    num_experts = sum(map(len, blobs))
    assert sum(of.num_experts for of in found) == num_experts
    left = num_bytes - total_bytes(found)
    assert all(of.num_slots == of.num_experts or of.slot_bytes > left for of in found), "nothing more fits"
    if len(found) > 1:
        for of, fewest_of in zip(found, classes, strict=True):
            assert fewest_of.num_slots <= of.num_slots <= of.num_experts
    in_one = min(num_experts, num_bytes // max(map(max, blobs)))
    assert sum(of.num_slots for of in found) >= in_one, "never fewer than if every slot were as long as the longest blob"


def test_classes_hold_the_same_fraction() -> None:
    classes = slot_classes([[2] * 50 + [7] * 10] * 12, 4)
    assert divide((600 * 2 + 120 * 7) // 2, classes, 4) == (SlotClass(300, 2, 600), SlotClass(60, 7, 120))
    assert divide(10**6, classes, 4) == (SlotClass(600, 2, 600), SlotClass(120, 7, 120))
    assert divide(36, classes, 4) == (SlotClass(4, 2, 600), SlotClass(4, 7, 120)), "the fewest of each"
    assert divide(35, classes, 4) == (SlotClass(5, 7, 720),), "too few for that: shared"
    rare = slot_classes([[2] * 50 + [7]] + [[2] * 51] * 11, 4)
    assert divide(611, rare, 4) == (SlotClass(302, 2, 611), SlotClass(1, 7, 1)), "the only one of its class is kept"


SHORT, LONG = layer(0, 0, 1, 2), layer(0, 3, 4, 5)
BLOB_BYTES = {ExpertId(number, expert): SLOT * (1 + expert // 3) for number in range(3) for expert in range(6)}

SHORT_BLOBS = marked_blobs((expert for expert, length in BLOB_BYTES.items() if length == SLOT), SLOT)
LONG_BLOBS = marked_blobs((expert for expert, length in BLOB_BYTES.items() if length > SLOT), 2 * SLOT)
BLOBS_BY_EXPERT = {**SHORT_BLOBS, **LONG_BLOBS}


def use(lease: Lease, arena: SlotArena) -> list[ExpertId]:
    return use_blobs(lease, arena, BLOBS_BY_EXPERT)


@pytest.fixture
def make() -> Iterator[Callable[..., tuple[Residency, SourceDouble, SlotArena]]]:
    made: list[tuple[Residency, SourceDouble]] = []

    def build(num_short: int, num_long: int, policy: str = "lru") -> tuple[Residency, SourceDouble, SlotArena]:
        source, arena = SourceDouble(MemorySource(BLOBS_BY_EXPERT), tears=True), SlotArena((num_short, SLOT), (num_long, 2 * SLOT))
        eviction = make_policy(policy, num_short + num_long, [6, 6, 6])
        residency = Residency(source, arena, eviction, blob_bytes=BLOB_BYTES)
        made.append((residency, source))
        return residency, source, arena

    yield build
    for residency, source in made:
        source.gate.set()
        residency.close()


Make = Callable[..., tuple[Residency, SourceDouble, SlotArena]]


def test_an_expert_displaces_only_its_like(make: Make) -> None:
    residency, _, arena = make(2, 1)
    use(residency.acquire([SHORT[0], SHORT[1], LONG[0]]), arena)
    use(residency.acquire([LONG[1]]), arena)
    assert [residency.is_ready(expert) for expert in (SHORT[0], SHORT[1], LONG[0], LONG[1])] == [True, True, False, True]
    assert len(arena.view(residency.slot_of(LONG[1]))) == 2 * SLOT
    use(residency.acquire([SHORT[2]]), arena)
    assert [residency.is_ready(expert) for expert in (*SHORT, LONG[1])] == [False, True, True, True]
    residency.check_integrity()


def test_a_demand_without_a_slot_blocks_no_other_class(make: Make) -> None:
    residency, source, _ = make(1, 1)
    holding = residency.acquire([LONG[0]])
    assert next(holding.batches())[0][0] == LONG[0]  # and in use from now on
    lease = residency.acquire([LONG[1], SHORT[0]])
    arrivals = lease.batches()
    assert next(arrivals)[0][0] == SHORT[0], "behind one that waits for the slot in use"
    assert source.experts == [LONG[0], SHORT[0]]
    holding.release()
    assert next(arrivals)[0][0] == LONG[1]
    lease.release()
    residency.check_integrity()


def test_a_prefetch_without_a_slot_blocks_no_other_class(make: Make) -> None:
    residency, _, _ = make(1, 1)
    holding = residency.acquire([LONG[0]])
    assert next(holding.batches())[0][0] == LONG[0]
    residency.prefetch([*layer(1, 3), *layer(1, 0)])
    residency.wait_idle()
    assert [residency.is_ready(expert) for expert in layer(1, 3, 0)] == [False, True]
    lease = residency.acquire([SHORT[0]])
    assert lease.lookups == {SHORT[0]: Lookup.MISS}
    assert [expert for batch in lease.batches() for expert, _ in batch] == [SHORT[0]], "nor a demand of another class"
    holding.release()
    lease.release()
    residency.wait_idle()
    residency.check_integrity()


@pytest.mark.parametrize("policy", ["lru", "co-activation"])
def test_many_threads_come_through_one_slot_of_each_class(make: Make, policy: str) -> None:
    residency, _, arena = make(1, 1, policy)
    passes = [layer(number, *order) for number, order in enumerate(([0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [3, 0, 4, 1, 5, 2]))]
    seen: list[set[ExpertId]] = []

    def work(turn: int) -> None:
        for round_ in range(6):
            experts = passes[(turn + round_) % 3]
            lease = residency.acquire(experts)
            residency.prefetch(passes[(turn + round_ + 1) % 3])
            seen.append(set(use(lease, arena)))

    threads = [threading.Thread(target=work, args=(turn,), daemon=True) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "stuck"
    assert len(seen) == 24
    assert all(len(experts) == 6 for experts in seen)
    residency.cancel_prefetches()
    residency.wait_idle()
    residency.check_integrity()
