"""Residency under any sequence of passes, cut short or failing, with slots of one length or of two."""

from __future__ import annotations

import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_moe.core import ExpertId
from fate_moe.errors import CorruptExpertError
from fate_moe.memory.residency import Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.registry import POLICIES, make_policy
from tests.memory.test_residency import NUM_EXPERTS, NUM_LAYERS, SLOT, Source, layer, mark

IDS = st.builds(ExpertId, st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1))
STEPS = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),  # routed
        st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True),  # prefetched for the next layer
        st.integers(0, NUM_EXPERTS),  # experts used before the pass is cut short
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    num_slots=st.integers(1, 8),
    io_threads=st.integers(2, 4),
    seconds=st.sampled_from([0.0, 0.0005]),
    fails=st.dictionaries(IDS, st.integers(1, 2), max_size=3),
    long=st.sets(IDS),
    num_long=st.integers(1, 3),
    steps=STEPS,
)
def test_whatever_happens_slots_hold_what_the_table_says(
    policy: str,
    num_slots: int,
    io_threads: int,
    seconds: float,
    fails: dict[ExpertId, int],
    long: set[ExpertId],
    num_long: int,
    steps: list[tuple[int, list[int], list[int], int, bool]],
) -> None:
    everybody = [ExpertId(number, expert) for number in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
    source, arena = Source(seconds), SlotArena((num_slots, SLOT), *([(num_long, 2 * SLOT)] if long else []))
    source.fails, source.long = dict(fails), long
    residency = Residency(
        source,
        arena,
        make_policy(policy, arena.num_slots, [NUM_EXPERTS] * NUM_LAYERS),
        blob_bytes={expert: 2 * SLOT if expert in long else SLOT for expert in everybody},
        io_threads=io_threads,
    )
    try:
        lookups = 0
        for number, routed, expected, used, check in steps:
            lease = residency.acquire(layer(number, *routed))
            lookups += len(routed)
            residency.prefetch(layer((number + 1) % NUM_LAYERS, *expected))
            try:
                for count, (expert, slot) in enumerate(lease):
                    for _ in range(2):  # locked: nobody overwrites it while it is in use
                        assert bytes(arena.view(slot)[:2]) == mark(expert)
                        assert expert not in long or bytes(arena.view(slot)[SLOT : SLOT + 2]) == mark(expert)
                        time.sleep(0)
                    if count + 1 == used:
                        break
            except CorruptExpertError:
                pass
            finally:
                lease.release()
            if check:
                residency.check_integrity()
        residency.wait_idle()
        residency.check_integrity()
        counters = residency.counters
        assert counters.lookups == lookups
        assert counters.prefetch_used <= counters.prefetched
        assert counters.bytes_read <= SLOT * len(source.reads)
        assert source.most_reading <= io_threads
        for expert in everybody:
            if residency.is_ready(expert):
                assert bytes(arena.view(residency.slot_of(expert))[:2]) == mark(expert)
    finally:
        residency.close()
