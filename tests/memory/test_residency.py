"""Residency against sources that are instant, slow, gated, failing and tearing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from fate_moe.core import ExpertId, Lookup
from fate_moe.errors import ClosedModelError, CorruptExpertError, StoreError
from fate_moe.kernels.extension import native
from fate_moe.memory import portable
from fate_moe.memory.residency import Lease, Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.registry import POLICIES, make_policy
from tests.support.sources import MemorySource, SourceDouble, marked_blobs

SLOT = 4096
NUM_LAYERS, NUM_EXPERTS = 3, 6


ALL = [ExpertId(number, expert) for number in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
BLOBS = marked_blobs(ALL, SLOT)


Make = Callable[..., tuple[Residency, SourceDouble, SlotArena]]
KINDS = [Residency] if native is None else [Residency, portable.Residency]  # the extension's too, where it is built


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__module__.rpartition(".")[2])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[tuple[Residency, SourceDouble]] = []

    def build(
        num_slots: int, policy: str = "lru", io_threads: int = 4, seconds: float = 0.0
    ) -> tuple[Residency, SourceDouble, SlotArena]:
        source, arena = SourceDouble(MemorySource(BLOBS), seconds, tears=True), SlotArena((num_slots, SLOT))
        residency = request.param(source, arena, make_policy(policy, num_slots, [NUM_EXPERTS] * NUM_LAYERS), io_threads=io_threads)
        made.append((residency, source))
        return residency, source, arena

    yield build
    for residency, source in made:
        source.gate.set()
        residency.close()
        assert source.closed


def layer(number: int, *experts: int) -> list[ExpertId]:
    return [ExpertId(number, expert) for expert in experts]


def use(lease: Lease, arena: SlotArena, blobs: Mapping[ExpertId, bytes] = BLOBS) -> list[ExpertId]:
    """Read through the lease as compute does; every slot must hold its own expert's bytes."""
    seen = []
    for batch in lease.batches():
        for expert, slot in batch:
            assert bytes(arena.view(slot)[: len(blobs[expert])]) == blobs[expert]
            seen.append(expert)
    lease.release()
    return seen


def test_miss_then_hit(make: Make) -> None:
    residency, _, arena = make(4)
    lease = residency.acquire(layer(0, 3, 1))
    assert list(lease.lookups.values()) == [Lookup.MISS] * 2
    assert sorted(use(lease, arena)) == layer(0, 1, 3)
    lease = residency.acquire(layer(0, 3, 1))
    assert list(lease.lookups.values()) == [Lookup.HIT] * 2
    assert use(lease, arena) == layer(0, 3, 1), "hits come in the order asked for"
    counters = residency.counters
    assert (counters.hits, counters.misses, counters.in_flight, counters.bytes_read) == (2, 2, 0, 2 * SLOT)
    assert counters.stall_seconds > 0
    assert residency.read_seconds > 0


def test_ready_experts_come_before_the_awaited(make: Make) -> None:
    residency, source, arena = make(4)
    use(residency.acquire(layer(0, 2)), arena)
    source.gate.clear()
    order = residency.acquire(layer(0, 1, 2)).batches()
    assert [expert for expert, _ in next(order)] == layer(0, 2)
    source.gate.set()
    assert [expert for expert, _ in next(order)] == layer(0, 1)


def test_arrivals_stay_locked_until_release(make: Make) -> None:
    residency, source, arena = make(3)
    use(residency.acquire(layer(0, 2)), arena)
    source.gate.clear()
    lease = residency.acquire(layer(0, 1, 2, 0))
    arrivals = lease.arrivals()
    assert next(arrivals)[0] == ExpertId(0, 2), "what was resident comes first"
    source.gate.set()
    assert {expert for expert, _ in arrivals} == {*layer(0, 0, 1)}
    residency.prefetch(layer(1, 0))
    residency.wait_idle()
    assert [residency.is_ready(expert) for expert in layer(0, 0, 1, 2)] == [True] * 3
    lease.release()
    residency.wait_idle()
    assert residency.is_ready(ExpertId(1, 0))
    residency.check_integrity()


def test_a_prefetch_that_ended_is_a_hit_one_under_way_is_in_flight_one_queued_is_a_miss(make: Make) -> None:
    residency, source, arena = make(6, io_threads=2)  # one prefetch at a time
    assert residency.prefetch(layer(1, 0)) == 1
    residency.wait_idle()
    source.gate.clear()
    assert residency.prefetch(layer(1, 0, 1, 2)) == 2
    assert source.has_begun(ExpertId(1, 1))
    lease = residency.acquire(layer(1, 0, 1, 2))
    assert list(lease.lookups.values()) == [Lookup.HIT, Lookup.IN_FLIGHT, Lookup.MISS]
    source.gate.set()
    assert set(use(lease, arena)) == set(layer(1, 0, 1, 2))
    assert sorted(source.experts) == layer(1, 0, 1, 2), "nothing is read twice"
    assert (residency.counters.prefetched, residency.counters.prefetch_used) == (2, 2)


def test_demand_goes_before_prefetch_and_a_thread_is_kept_for_it(make: Make) -> None:
    residency, source, arena = make(12, io_threads=3)
    source.gate.clear()
    residency.prefetch(layer(2, 0, 1, 2, 3))
    assert source.has_begun(ExpertId(2, 0))
    assert source.has_begun(ExpertId(2, 1))
    lease = residency.acquire(layer(0, 5))
    assert source.has_begun(ExpertId(0, 5)), "two prefetches are under way, the third thread is free for this"
    assert sorted(source.experts) == [ExpertId(0, 5), *layer(2, 0, 1)]
    source.gate.set()
    use(lease, arena)


def test_queued_prefetches_of_an_acquired_layer_are_cancelled(make: Make) -> None:
    residency, source, arena = make(6, io_threads=2)
    source.gate.clear()
    residency.prefetch(layer(1, 0, 1, 2))
    assert source.has_begun(ExpertId(1, 0))
    lease = residency.acquire(layer(1, 0))
    source.gate.set()
    use(lease, arena)
    residency.wait_idle()
    assert source.experts == layer(1, 0)


def test_cancel_prefetches(make: Make) -> None:
    residency, source, _ = make(6, io_threads=2)
    source.gate.clear()
    residency.prefetch(layer(1, 0, 1, 2))
    assert source.has_begun(ExpertId(1, 0))
    residency.cancel_prefetches()
    source.gate.set()
    residency.wait_idle()
    assert source.experts == layer(1, 0)


def test_prefetch_evicts_neither_locked_nor_fresh(make: Make) -> None:
    residency, _, _ = make(3)
    lease = residency.acquire(layer(0, 0))
    assert [expert for expert, _ in next(lease.batches())] == layer(0, 0)
    residency.prefetch(layer(1, 0, 1, 2, 3))
    residency.wait_idle()
    assert residency.is_ready(ExpertId(0, 0))
    assert [residency.is_ready(expert) for expert in layer(1, 0, 1, 2, 3)] == [True, True, False, False]
    residency.check_integrity()
    lease.release()
    residency.wait_idle()
    assert residency.is_ready(ExpertId(1, 2)), "the slot that was let go takes the next one"
    lease = residency.acquire(layer(2, 0))  # demand takes a fresh one where nothing else is left
    assert [expert for expert, _ in next(lease.batches())] == layer(2, 0)
    lease.release()


def test_an_expected_resident_is_kept(make: Make) -> None:
    residency, _, arena = make(2)
    use(residency.acquire(layer(1, 0)), arena)
    use(residency.acquire(layer(0, 0)), arena)
    assert residency.prefetch(layer(1, 0, 1), most=1) == 1  # (1, 0) is the least recently used
    residency.wait_idle()
    assert [residency.is_ready(expert) for expert in layer(1, 0, 1)] == [True, True]


def test_prefetch_stops_at_most(make: Make) -> None:
    residency, source, _ = make(6)
    assert residency.prefetch(layer(1, 0, 1, 2), most=2) == 2
    residency.wait_idle()
    assert set(source.experts) == set(layer(1, 0, 1))
    assert residency.prefetch(layer(1, 0, 1, 2), most=2) == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_slots", [1, 2])
def test_more_experts_than_slots(make: Make, policy: str, num_slots: int) -> None:
    residency, _, arena = make(num_slots, policy)
    for _ in range(3):
        for number in range(NUM_LAYERS):
            lease = residency.acquire(layer(number, *range(NUM_EXPERTS)))
            residency.prefetch(layer((number + 1) % NUM_LAYERS, 0, 1, 2))
            assert set(use(lease, arena)) == set(layer(number, *range(NUM_EXPERTS)))
    residency.wait_idle()
    residency.check_integrity()


def test_release_withdraws_and_may_be_repeated(make: Make) -> None:
    residency, source, arena = make(1)
    source.gate.clear()
    lease = residency.acquire(layer(0, 0, 1, 2))
    assert source.has_begun(ExpertId(0, 0))
    lease.release()
    lease.release()
    source.gate.set()
    residency.wait_idle()
    assert source.experts == layer(0, 0)
    residency.check_integrity()
    assert use(residency.acquire(layer(0, 1)), arena) == layer(0, 1)


def test_a_failing_demand_read_raises_and_frees_its_slot(make: Make) -> None:
    residency, source, arena = make(1)
    source.fails[ExpertId(0, 0)] = 1
    lease = residency.acquire(layer(0, 0))
    with pytest.raises(CorruptExpertError):
        use(lease, arena)
    lease.release()
    residency.check_integrity()
    assert not residency.is_ready(ExpertId(0, 0))
    assert use(residency.acquire(layer(0, 0)), arena) == layer(0, 0)


def test_a_failing_prefetch_is_forgotten(make: Make) -> None:
    residency, source, arena = make(2)
    source.fails[ExpertId(1, 0)] = 1
    residency.prefetch(layer(1, 0))
    residency.wait_idle()
    residency.check_integrity()
    lease = residency.acquire(layer(1, 0))
    assert lease.lookups[ExpertId(1, 0)] is Lookup.MISS
    assert use(lease, arena) == layer(1, 0)


@pytest.mark.parametrize("failures", [1, 2])
def test_who_joined_a_failing_prefetch_gets_one_read_of_its_own(make: Make, failures: int) -> None:
    residency, source, arena = make(2)
    source.fails[ExpertId(1, 0)] = failures
    source.gate.clear()
    residency.prefetch(layer(1, 0))
    assert source.has_begun(ExpertId(1, 0))
    lease = residency.acquire(layer(1, 0))
    assert lease.lookups[ExpertId(1, 0)] is Lookup.IN_FLIGHT
    source.gate.set()
    if failures == 1:
        assert use(lease, arena) == layer(1, 0)
    else:
        with pytest.raises(StoreError):
            use(lease, arena)
        lease.release()
    assert source.experts == layer(1, 0, 0)
    residency.wait_idle()
    residency.check_integrity()


def test_two_threads_share_one_read(make: Make) -> None:
    residency, source, arena = make(4, seconds=0.02)
    results: list[list[ExpertId]] = []
    threads = [threading.Thread(target=lambda: results.append(use(residency.acquire(layer(0, 1)), arena))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == [layer(0, 1)] * 2
    assert source.experts == layer(0, 1)


def test_closing_wakes_who_waits_and_refuses_who_comes(make: Make) -> None:
    residency, source, _ = make(1)
    source.gate.clear()
    lease = residency.acquire(layer(0, 0, 1))
    failures: list[Exception] = []

    def wait() -> None:
        try:
            for _ in lease.batches():
                pass
        except ClosedModelError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    closing = threading.Thread(target=residency.close)
    time.sleep(0.05)
    closing.start()
    time.sleep(0.05)
    source.gate.set()
    for thread in (waiting, closing):
        thread.join(10)
        assert not thread.is_alive()
    assert len(failures) == 1
    with pytest.raises(ClosedModelError, match="closed"):
        residency.acquire(layer(0, 0))
    assert residency.prefetch(layer(0, 0)) == 0
