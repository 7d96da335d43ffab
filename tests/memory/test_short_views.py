"""Experts whose slots hold only the first sections: what is read, what is upgraded, and that no lease gets less than asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_moe.core import ExpertId, Lookup
from fate_moe.errors import CorruptExpertError
from fate_moe.memory.residency import Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.memory.table import WHOLE
from fate_moe.registry import make_policy
from tests.memory.test_residency import KINDS
from tests.support.sources import MemorySource, SourceDouble, marked_blobs

SLOT, SECTIONS = 4096, 4


EXPERTS = [ExpertId(0, expert) for expert in range(6)]
BLOBS = marked_blobs(EXPERTS, SLOT)
ENDS = [1024 * (section + 1) for section in range(SECTIONS)]


def double() -> SourceDouble:
    return SourceDouble(MemorySource(BLOBS, ENDS), tears=True)


def blob_start(expert: ExpertId, sections: int) -> bytes:
    return BLOBS[expert][: 1024 * min(sections, SECTIONS)]


Make = Callable[[int], tuple[Residency, SourceDouble, SlotArena]]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__module__.rpartition(".")[2])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[tuple[Residency, SourceDouble]] = []

    def build(num_slots: int) -> tuple[Residency, SourceDouble, SlotArena]:
        source, arena = double(), SlotArena((num_slots, SLOT))
        residency = request.param(source, arena, make_policy("lru", num_slots, [6, 6]))
        made.append((residency, source))
        return residency, source, arena

    yield build
    for residency, source in made:
        source.gate.set()
        residency.close()


A, B, C = (ExpertId(0, expert) for expert in range(3))


def use(residency: Residency, arena: SlotArena, wanted: dict[ExpertId, int]) -> dict[ExpertId, Lookup]:
    """Acquire as the runtime does; every slot must hold at least what was wanted, and what ``held`` says."""
    lease = residency.acquire(list(wanted), sections=wanted)
    for expert, slot in chain.from_iterable(lease.batches()):
        held = residency.held(expert)
        assert held >= wanted[expert]
        start = blob_start(expert, held)
        assert bytes(arena.view(slot)[: len(start)]) == start
    lease.release()
    residency.check_integrity()
    return lease.lookups


def test_a_short_view_then_the_rest_into_the_same_slot(make: Make) -> None:
    residency, source, arena = make(2)
    assert use(residency, arena, {A: 2}) == {A: Lookup.MISS}
    slot = residency.slot_of(A)
    assert use(residency, arena, {A: 2}) == {A: Lookup.HIT}
    assert use(residency, arena, {A: 1}) == {A: Lookup.HIT}
    assert use(residency, arena, {A: 3}) == {A: Lookup.MISS}
    assert use(residency, arena, {A: WHOLE}) == {A: Lookup.MISS}
    assert use(residency, arena, {A: WHOLE}) == {A: Lookup.HIT}
    assert source.reads == [(A, 0, 2), (A, 2, 3), (A, 3, None)]
    assert residency.slot_of(A) == slot
    assert residency.counters.bytes_read == 4096, "nothing is read twice"
    assert (residency.counters.upgrades, residency.counters.misses, residency.counters.hits) == (2, 3, 3)


def test_prefetches_are_whole(make: Make) -> None:
    residency, source, arena = make(2)
    residency.prefetch([A])
    residency.wait_idle()
    assert use(residency, arena, {A: 2}) == {A: Lookup.HIT}
    assert source.reads == [(A, 0, None)]


def test_an_eviction_forgets_what_was_held(make: Make) -> None:
    residency, source, arena = make(1)
    use(residency, arena, {A: 2})
    use(residency, arena, {B: WHOLE})
    assert residency.held(A) == 0
    use(residency, arena, {A: 3})
    assert source.reads == [(A, 0, 2), (B, 0, None), (A, 0, 3)]


def test_who_wants_more_than_the_read_under_way_brings_gets_it(make: Make) -> None:
    residency, source, arena = make(2)
    source.gate.clear()
    first = residency.acquire([A], sections={A: 2})
    assert source.has_begun(A)
    second = residency.acquire([A], sections={A: WHOLE})
    assert second.lookups == {A: Lookup.IN_FLIGHT}
    source.gate.set()
    for lease, sections in ((first, 2), (second, SECTIONS)):
        (((_, slot),),) = lease.batches()
        start = blob_start(A, sections)
        assert bytes(arena.view(slot)[: len(start)]) == start
        lease.release()
    assert source.reads == [(A, 0, 2), (A, 2, None)]
    residency.check_integrity()


def test_an_upgrade_that_fails_is_raised_and_the_slot_is_free(make: Make) -> None:
    residency, source, arena = make(1)
    use(residency, arena, {A: 2})
    source.fails[A] = 1
    lease = residency.acquire([A])
    with pytest.raises(CorruptExpertError):
        list(lease.batches())
    lease.release()
    residency.check_integrity()
    assert residency.held(A) == 0
    assert use(residency, arena, {B: WHOLE}) == {B: Lookup.MISS}


def test_the_rest_is_read_though_one_before_it_has_no_slot(make: Make) -> None:
    """The only slot holds too little of one that is asked for second: it can be read into, and then given up."""
    residency, source, arena = make(1)
    use(residency, arena, {A: 2})
    assert use(residency, arena, {B: WHOLE, A: WHOLE}) == {B: Lookup.MISS, A: Lookup.MISS}
    assert source.reads == [(A, 0, 2), (A, 2, None), (B, 0, None)]


def test_the_time_of_a_whole_read_is_reckoned_from_short_ones(make: Make) -> None:
    residency, _, arena = make(1)
    use(residency, arena, {A: 1})
    assert residency.read_seconds == pytest.approx(4 * residency.counters.link_seconds), "a fourth of the slot's bytes"


def test_a_whole_read_is_as_long_as_the_expert_not_as_the_longest_slot() -> None:
    residency = Residency(double(), SlotArena((1, SLOT), (1, 8 * SLOT)), make_policy("lru", 2, [6]), blob_bytes={A: SLOT})
    lease = residency.acquire([A], sections={A: 1})
    assert [expert for expert, _ in chain.from_iterable(lease.batches())] == [A]
    lease.release()
    assert residency.read_seconds == pytest.approx(4 * residency.counters.link_seconds)
    residency.close()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(
            st.builds(ExpertId, st.just(0), st.integers(0, 5)), st.sampled_from([1, 2, 3, WHOLE]), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_sequence(make: Make, passes: list[dict[ExpertId, int]]) -> None:
    residency, _, arena = make(3)
    for wanted in passes:
        residency.prefetch([next(iter(wanted))])
        use(residency, arena, wanted)
