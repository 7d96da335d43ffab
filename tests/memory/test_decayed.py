"""The default policy, beyond the contract: bypass and margin; and what Least-Stale promises."""

from __future__ import annotations

from fate_moe.core import ExpertId
from fate_moe.memory.decayed import Decayed
from fate_moe.memory.policies import LeastStale


def use(policy: Decayed, expert: int, resident: set[int], capacity: int) -> bool:
    """One token of one layer that uses one expert; whether it was there."""
    policy.routed(0, [expert])
    hit = expert in resident
    if not hit:
        if len(resident) == capacity:
            victim = policy.victim(ExpertId(0, expert), lambda e: e.expert != expert)
            assert victim is not None
            policy.removed(victim)
            resident.remove(victim.expert)
        policy.admitted(ExpertId(0, expert))
        resident.add(expert)
    policy.touched(ExpertId(0, expert))
    return hit


def test_single_uses_pass_through_one_slot() -> None:
    policy, resident = Decayed([40], co_activation=False), set[int]()
    for _ in range(10):
        for expert in (0, 1, 2):
            use(policy, expert, resident, 4)
    for expert in range(10, 16):
        use(policy, expert, resident, 4)
        assert {0, 1, 2} < resident


def test_a_prefetch_does_not_displace_what_is_likelier() -> None:
    policy, resident = Decayed([8], co_activation=False), set[int]()
    for _ in range(50):
        for expert in (0, 1):
            use(policy, expert, resident, 2)
    incoming = ExpertId(0, 5)
    assert policy.victim(incoming, lambda e: True, 0.3) is None
    assert policy.victim(incoming, lambda e: True, 0.9) is not None
    assert policy.victim(incoming, lambda e: True) is not None


def test_least_stale_evicts_the_pass_before() -> None:
    policy = LeastStale()
    for layer in range(3):
        policy.routed(layer, [0])
        policy.admitted(ExpertId(layer, 0))
    policy.routed(0, [1])  # the next pass
    policy.touched(ExpertId(0, 0))
    policy.admitted(ExpertId(0, 1))
    assert policy.victim(ExpertId(1, 1), lambda e: True) == ExpertId(1, 0)
    policy.admitted(ExpertId(1, 5), prefetched=True)
    stale = {ExpertId(1, 0), ExpertId(2, 0)}
    assert policy.victim(ExpertId(1, 1), lambda e: e not in stale) == ExpertId(0, 0), "then the shallowest"
