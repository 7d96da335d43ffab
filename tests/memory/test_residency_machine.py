"""Residency under any sequence of passes, failing or cut short, with slots of one length or of two, as production iterates."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_moe.core import ExpertId
from fate_moe.errors import StoreError
from fate_moe.memory.residency import Lease, Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.registry import POLICIES, make_policy
from tests.memory.test_residency import ALL, KINDS, NUM_EXPERTS, NUM_LAYERS, SLOT, layer
from tests.support.sources import MemorySource, SourceDouble, marked_blobs

IDS = st.sampled_from(ALL)
NUMBERS = st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True)
FAILURES = st.dictionaries(IDS, st.integers(1, 2), max_size=3)


class Pass(NamedTuple):
    """One layer's turn: its experts, a prefetch for the next layer, and where the pass is cut short."""

    layer: int
    routed: list[int]
    expected: list[int]
    cut: int  # steps of the iteration before it ends; 0: it never begins
    one_by_one: bool  # arrivals() where there are slots for all at once, else batches()
    check: bool


PASSES = st.builds(
    Pass, st.integers(0, NUM_LAYERS - 1), NUMBERS, NUMBERS, st.integers(0, NUM_EXPERTS + 1), st.booleans(), st.booleans()
)


@dataclass
class World:
    """A residency over slots of one length or two, with everything it may be checked against."""

    policy: str
    num_slots: int
    num_long: int
    long: set[ExpertId]
    source: SourceDouble = field(init=False)
    arena: SlotArena = field(init=False)
    residency: Residency = field(init=False)
    blobs: dict[ExpertId, bytes] = field(init=False)

    def start(self, kind: type[Residency], io_threads: int, seconds: float) -> None:
        self.blobs = {**marked_blobs(set(ALL) - self.long, SLOT), **marked_blobs(self.long, 2 * SLOT)}
        self.source = SourceDouble(MemorySource(self.blobs), seconds, tears=True)
        self.arena = SlotArena((self.num_slots, SLOT), *([(self.num_long, 2 * SLOT)] if self.long else []))
        self.residency = kind(
            self.source,
            self.arena,
            make_policy(self.policy, self.arena.num_slots, [NUM_EXPERTS] * NUM_LAYERS),
            blob_bytes={expert: len(blob) for expert, blob in self.blobs.items()},
            io_threads=io_threads,
        )

    def has_slots_for(self, experts: list[ExpertId]) -> bool:
        """Whether all of ``experts`` can be resident at once."""
        counts = Counter(expert in self.long for expert in experts)
        return counts[False] <= self.num_slots and counts[True] <= self.num_long

    def holds(self, expert: ExpertId, slot: int) -> bool:
        blob = self.blobs[expert]
        return bytes(self.arena.view(slot)[: len(blob)]) == blob


def steps_of(lease: Lease, one_by_one: bool) -> Iterator[list[tuple[ExpertId, int]]]:
    if not one_by_one:
        yield from lease.batches()
        return
    for pair in lease.arrivals():
        yield [pair]


def run(world: World, turn: Pass) -> None:
    """One pass as the runtime makes it, whatever happens to it."""
    routed = layer(turn.layer, *turn.routed)
    lease = world.residency.acquire(routed)
    one_by_one = turn.one_by_one and world.has_slots_for(routed)
    world.residency.prefetch(layer((turn.layer + 1) % NUM_LAYERS, *turn.expected))
    usable: list[tuple[ExpertId, int]] = []
    seen: list[ExpertId] = []
    try:
        if turn.cut:
            for step, arrived in enumerate(steps_of(lease, one_by_one), start=1):
                seen += [expert for expert, _ in arrived]
                usable = [*usable, *arrived] if one_by_one else arrived  # arrivals stay locked
                for _ in range(2):  # nobody overwrites what is locked
                    assert all(world.holds(expert, slot) for expert, slot in usable)
                    time.sleep(0)
                if step == turn.cut:
                    break
            else:
                assert sorted(seen) == sorted(routed), "a pass that is neither cut short nor fails gives all"
    except StoreError as error:
        if not any(f"layer {expert.layer} expert {expert.expert} " in str(error) for expert in routed):
            raise
    finally:
        if turn.check:
            world.residency.check_integrity()
        lease.release()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(routed)
    if turn.check:
        world.residency.check_integrity()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    world=st.builds(World, st.sampled_from(list(POLICIES)), st.integers(1, 8), st.integers(1, 3), st.sets(IDS)),
    kind=st.sampled_from(KINDS),
    io_threads=st.integers(2, 4),
    seconds=st.sampled_from([0.0, 0.0005]),
    fails=FAILURES,
    shorts=FAILURES,
    passes=st.lists(PASSES, max_size=25),
)
def test_whatever_happens_slots_hold_what_the_table_says(
    world: World,
    kind: type[Residency],
    io_threads: int,
    seconds: float,
    fails: dict[ExpertId, int],
    shorts: dict[ExpertId, int],
    passes: list[Pass],
) -> None:
    world.start(kind, io_threads, seconds)
    source, residency = world.source, world.residency
    source.fails, source.shorts = dict(fails), dict(shorts)
    try:
        for turn in passes:
            run(world, turn)
        residency.wait_idle()
        residency.check_integrity()
        counters = residency.counters
        assert counters.lookups == sum(len(turn.routed) for turn in passes)
        assert counters.prefetch_used <= counters.prefetched
        assert counters.bytes_read <= sum(len(world.blobs[expert]) for expert in source.experts)
        assert source.most_reading <= io_threads
        for expert in ALL:
            assert not residency.is_ready(expert) or world.holds(expert, residency.slot_of(expert))
    finally:
        residency.close()
