"""One contract for all eviction policies, and each against an independent model of what its name promises."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe.core import EvictionPolicy, ExpertId
from fate_moe.errors import ConfigError
from fate_moe.memory.arc import ARC
from fate_moe.memory.policies import LFU
from fate_moe.memory.shallow import ShallowARC, shallow_quotas
from fate_moe.registry import POLICIES, make_policy

EXPERTS = st.builds(ExpertId, st.integers(0, 5), st.integers(0, 5))
REQUESTS = st.lists(EXPERTS, max_size=200)


def anything(_: ExpertId) -> bool:
    return True


class Cache:
    """The smallest user of a policy: demand requests only, everything evictable."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy, self.capacity = policy, capacity
        self.resident: set[ExpertId] = set()

    def request(
        self, expert: ExpertId, evictable: Callable[[ExpertId], bool] = anything, prefetch: bool = False
    ) -> ExpertId | None:
        """Returns what was evicted."""
        victim = None
        if expert not in self.resident:
            if len(self.resident) == self.capacity:
                victim = self.policy.victim(expert, evictable)
                if victim is None:
                    return None
                self.policy.removed(victim)
                self.resident.remove(victim)
            self.policy.admitted(expert, prefetched=prefetch)
            self.resident.add(expert)
        if not prefetch:
            self.policy.touched(expert)
        return victim


@pytest.mark.parametrize("name", POLICIES)
@given(
    capacity=st.integers(1, 12),
    requests=st.lists(st.tuples(EXPERTS, st.booleans(), st.sets(EXPERTS, max_size=12), st.booleans()), max_size=150),
)
def test_contract(name: str, capacity: int, requests: list[tuple[ExpertId, bool, set[ExpertId], bool]]) -> None:
    """A victim is resident and evictable; None only where nothing is; asking changes nothing; removal without admission is fine."""
    policy = make_policy(name, capacity, [6] * 6)
    cache = Cache(policy, capacity)
    for expert, prefetch, locked, drop in requests:
        first = policy.victim(expert, lambda e, locked=locked: e not in locked)  # type: ignore[misc]
        assert policy.victim(expert, lambda e, locked=locked: e not in locked) == first  # type: ignore[misc]
        assert (first is None) == (not cache.resident - locked)
        assert first is None or first in cache.resident - locked
        if drop and expert in cache.resident:  # a read that failed
            policy.removed(expert)
            cache.resident.remove(expert)
        cache.request(expert, lambda e, locked=locked: e not in locked, prefetch)  # type: ignore[misc]
        assert len(cache.resident) <= capacity
    for _ in range(len(cache.resident)):  # the policy lists exactly what is resident
        victim = policy.victim(ExpertId(0, 0), anything)
        assert victim in cache.resident
        policy.removed(victim)
        cache.resident.remove(victim)
    assert policy.victim(ExpertId(0, 0), anything) is None


def test_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="'mru'"):
        make_policy("mru", 4, [4])


@given(capacity=st.integers(1, 12), requests=REQUESTS)
def test_lru_is_an_ordered_dict(capacity: int, requests: list[ExpertId]) -> None:
    cache, model = Cache(make_policy("lru", capacity, [6] * 6), capacity), OrderedDict[ExpertId, None]()
    for expert in requests:
        evicted = cache.request(expert)
        expected = model.popitem(last=False)[0] if expert not in model and len(model) == capacity else None
        model[expert] = None
        model.move_to_end(expert)
        assert evicted == expected
        assert cache.resident == set(model)


@given(capacity=st.integers(1, 12), half_life=st.sampled_from([1, 3, 50]), requests=REQUESTS)
def test_lfu_is_brute_force(capacity: int, half_life: int, requests: list[ExpertId]) -> None:
    cache = Cache(LFU(half_life), capacity)
    uses: dict[ExpertId, list[int]] = {}
    for now, expert in enumerate(requests):
        before = set(cache.resident)
        evicted = cache.request(expert)
        if evicted is not None:
            scores = {e: sum(2.0 ** ((then - now) / half_life) for then in uses[e]) for e in before}
            assert scores[evicted] <= min(scores.values()) * (1 + 1e-9)
        uses.setdefault(expert, []).append(now)


def test_lfu_survives_its_growing_unit() -> None:
    cache = Cache(LFU(half_life=1), 3)  # doubles per use: rescaled about every 500 uses
    for turn in range(4000):
        cache.request(ExpertId(0, turn % 2))
    cache.request(ExpertId(0, 2))
    for _ in range(3):
        cache.request(ExpertId(0, 0))
    # In units of the last use: expert 0 has 1 + 1/2 + 1/4 and more, 2 has 1/8, 1 has 1/16 + 1/64 + ... = 1/12; infinities tie.
    assert cache.request(ExpertId(0, 3)) == ExpertId(0, 1)
    assert cache.request(ExpertId(0, 4)) == ExpertId(0, 2)
    assert cache.resident == {ExpertId(0, expert) for expert in (0, 3, 4)}


class TextbookARC:
    """Megiddo and Modha, FAST 2003, figure 4, line by line; index 0 is the least recent."""

    def __init__(self, c: int) -> None:
        self.c, self.p = c, 0.0
        self.t1: list[ExpertId] = []
        self.t2: list[ExpertId] = []
        self.b1: list[ExpertId] = []
        self.b2: list[ExpertId] = []

    def replace(self, x: ExpertId) -> None:
        if self.t1 and ((x in self.b2 and len(self.t1) == self.p) or len(self.t1) > self.p):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def request(self, x: ExpertId) -> None:
        if x in self.t1 or x in self.t2:
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
        elif x in self.b1:
            self.p = min(self.p + max(len(self.b2) / len(self.b1), 1), self.c)
            self.replace(x)
            self.b1.remove(x)
            self.t2.append(x)
        elif x in self.b2:
            self.p = max(self.p - max(len(self.b1) / len(self.b2), 1), 0)
            self.replace(x)
            self.b2.remove(x)
            self.t2.append(x)
        else:
            total = len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2)
            if len(self.t1) + len(self.b1) == self.c:
                if len(self.t1) < self.c:
                    self.b1.pop(0)
                    self.replace(x)
                else:
                    self.t1.pop(0)
            elif total >= self.c:
                if total == 2 * self.c:
                    self.b2.pop(0)
                self.replace(x)
            self.t1.append(x)


@settings(max_examples=300)
@given(capacity=st.integers(1, 8), requests=st.lists(st.builds(ExpertId, st.just(0), st.integers(0, 15)), max_size=300))
def test_arc_is_the_textbook(capacity: int, requests: list[ExpertId]) -> None:
    arc, textbook = ARC(capacity), TextbookARC(capacity)
    cache = Cache(arc, capacity)
    for expert in requests:
        cache.request(expert)
        textbook.request(expert)
        assert (list(arc.t1), list(arc.t2)) == (textbook.t1, textbook.t2)
        assert (list(arc.b1), list(arc.b2)) == (textbook.b1, textbook.b2)
        assert arc.p == pytest.approx(textbook.p)


@given(
    capacity=st.integers(1, 8),
    requests=st.lists(st.tuples(st.builds(ExpertId, st.just(0), st.integers(0, 15)), st.booleans(), st.sets(st.integers(0, 15)))),
)
def test_arc_invariants_hold_with_locks_and_prefetches(capacity: int, requests: list[tuple[ExpertId, bool, set[int]]]) -> None:
    arc = ARC(capacity)
    cache = Cache(arc, capacity)
    for expert, prefetch, locked in requests:
        cache.request(expert, lambda e, locked=locked: e.expert not in locked, prefetch)  # type: ignore[misc]
        lists = [set(arc.t1), set(arc.t2), set(arc.b1), set(arc.b2)]
        assert len(set().union(*lists)) == sum(map(len, lists)), "an expert is in one list only"
        assert lists[0] | lists[1] == cache.resident
        assert len(arc.t1) + len(arc.t2) <= capacity
        assert len(arc.t1) + len(arc.b1) <= capacity or not arc.b1
        assert sum(map(len, lists)) <= 2 * capacity
        assert 0 <= arc.p <= capacity


@pytest.mark.parametrize("name", ["lru", "arc", "shallow-arc"])
def test_what_was_prefetched_in_vain_goes_first(name: str) -> None:
    cache = Cache(make_policy(name, 3, [6]), 3)
    cache.request(ExpertId(0, 0))
    cache.request(ExpertId(0, 1))
    cache.request(ExpertId(0, 2), prefetch=True)
    assert cache.request(ExpertId(0, 3)) == ExpertId(0, 2)


@given(num_slots=st.integers(1, 100), layers=st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_shallow_quotas(num_slots: int, layers: list[int]) -> None:
    quotas = shallow_quotas(num_slots, layers)
    assert sum(quotas) == min(num_slots, sum(layers))
    assert all(0 <= quota <= num_experts for quota, num_experts in zip(quotas, layers, strict=True))


def test_shallow_quotas_favour_the_shallow() -> None:
    assert shallow_quotas(180, [60] * 12) == [60, *[11] * 10, 10]
    assert shallow_quotas(600, [60] * 12) == [60, 60, 60, 60, *[45] * 8]
    assert shallow_quotas(40, [60] * 4) == [10] * 4, "where no layer fits in half the slots, all share"


def test_shallow_layers_stay_whole_once_read() -> None:
    policy = ShallowARC(40, [8] * 10)
    cache = Cache(policy, 40)
    for turn in range(50):
        for layer in range(10):
            for choice in range(3):
                cache.request(ExpertId(layer, (turn * (layer + 1) + choice * 3) % 8))
    assert policy.quotas[:2] == [8, 8]
    assert {ExpertId(layer, expert) for layer in range(2) for expert in range(8)} <= cache.resident


def test_a_layer_below_its_quota_takes_from_the_one_above() -> None:
    policy = ShallowARC(6, [9, 9, 9])  # quotas 2, 2, 2
    cache = Cache(policy, 6)
    for expert in range(6):
        cache.request(ExpertId(2, expert))  # lent
    assert cache.request(ExpertId(0, 0)) == ExpertId(2, 0)
    assert cache.request(ExpertId(1, 0)) == ExpertId(2, 1)
    assert cache.request(ExpertId(2, 8)) == ExpertId(2, 2)
