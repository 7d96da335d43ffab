"""Precision policies: one contract for all, and what each is for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.config import PRECISION_POLICIES, OffloadConfig
from fate_moe.core import Need, PrecisionPolicy
from fate_moe.errors import ConfigError
from fate_moe.memory.precision import Budget, FixedView, PrefillPopularity, RoutingWeighted, make_precision_policy

VIEWS = [2, 3, 4]
NAMES = [name for name in PRECISION_POLICIES if name != "full"]

needs_of = st.lists(
    st.builds(Need, st.integers(1, 50), st.floats(0, 10, allow_nan=False), st.sampled_from([0, 2, 3, 4])), min_size=1, max_size=60
)


def policy_of(name: str) -> PrecisionPolicy:
    policy = make_precision_policy(name)
    assert policy is not None
    return policy


@pytest.mark.parametrize("name", NAMES)
@given(needs=needs_of, views=st.sampled_from([[2, 3, 4], [4, 8], [2, 3, 4, 8]]), affordable=st.floats(0, 500))
def test_every_policy_answers_with_views(name: str, needs: list[Need], views: list[int], affordable: float) -> None:
    policy = policy_of(name)
    bits = policy.bits(needs, views, affordable)
    assert len(bits) == len(needs)
    assert set(bits) <= set(views) | {need.held for need in needs}
    assert bits == policy.bits(needs, views, affordable), "it decides from what it is given alone"


def test_full_is_no_policy_and_the_default() -> None:
    assert make_precision_policy("full") is None
    assert OffloadConfig().precision_policy == "full"
    with pytest.raises(ConfigError, match=r"'gate-wieghted'.*did you mean 'routing-weighted'"):
        OffloadConfig(precision_policy="gate-wieghted")
    with pytest.raises(ConfigError, match="half"):
        make_precision_policy("half")


@given(needs_of)
def test_popularity_shortens_at_most_its_share_of_the_tokens(needs: list[Need]) -> None:
    bits = PrefillPopularity(share=0.25).bits(needs, VIEWS, 0.0)
    short = [need.num_tokens for need, b in zip(needs, bits, strict=True) if b < 4]
    whole = [need.num_tokens for need, b in zip(needs, bits, strict=True) if b == 4]
    total = sum(need.num_tokens for need in needs)
    assert sum(short) <= 0.25 * total
    assert not short or max(short) <= min(whole), "the least popular ones"
    if max(need.num_tokens for need in needs) > 1 and whole:
        assert sum(short) + min(whole) > 0.25 * total, "as many as fit into the share"


def test_what_a_view_loses_limits_popularity() -> None:
    """Half a nat for everything: a fiftieth of the tokens may lose 0.01. A robust model keeps the share."""
    needs = [Need(1, 0.1, 0), Need(1, 0.1, 0), Need(8, 1.0, 0), Need(90, 9.0, 0)]
    assert PrefillPopularity(losses={2: 4.0, 3: 0.5}).bits(needs, VIEWS, 0.0) == [3, 3, 4, 4]
    assert PrefillPopularity(losses={2: 4.0, 3: 0.6}).bits(needs, VIEWS, 0.0) == [3, 4, 4, 4]
    assert PrefillPopularity(losses={2: 0.2, 3: 0.04}).bits(needs, VIEWS, 0.0) == [3, 3, 3, 4]
    assert PrefillPopularity(losses={}).bits(needs, VIEWS, 0.0) == [4, 4, 4, 4]


def test_what_views_lose_limits_gate_weighted() -> None:
    needs = [Need(1, weight, held) for weight, held in ((0.4, 0), (0.4, 2), (0.1, 0), (0.09, 2), (0.01, 0))]
    assert (
        RoutingWeighted(losses={2: 0.21, 3: 0.04}).bits(needs, VIEWS, 0.0)
        == RoutingWeighted().bits(needs, VIEWS, 0.0)
        == [4, 4, 2, 2, 2]
    )
    assert RoutingWeighted(losses={2: 3.7, 3: 0.4}).bits(needs, VIEWS, 0.0) == [4, 4, 3, 3, 2]
    assert RoutingWeighted(losses={}).bits(needs, VIEWS, 0.0) == [4] * 5, "what nobody knows is not read"


def test_what_views_lose_limits_budget() -> None:
    needs = [Need(1, weight, 0) for weight in (0.5, 0.3, 0.2)]
    assert Budget({2: 0.2, 3: 0.04}).bits(needs, VIEWS, 9.0) == [3, 3, 3]
    assert Budget({2: 0.2, 3: 0.04}).bits(needs, VIEWS, 11.0) == [4, 4, 3]
    assert Budget({2: 4.0, 3: 0.6}).bits(needs, VIEWS, 0.0) == [4, 4, 4]


def test_models_that_nobody_measured_count_as_sensitive() -> None:
    needs = [Need(1, weight, 0) for weight in (0.45, 0.3, 0.17, 0.08)]
    gate, measured = make_precision_policy("routing-weighted"), make_precision_policy("routing-weighted", {2: 0.2, 3: 0.04})
    assert gate is not None
    assert measured is not None
    assert gate.bits(needs, VIEWS, 0.0) == [4, 4, 4, 3]
    assert measured.bits(needs, VIEWS, 0.0) == [4, 4, 2, 2]


def test_a_fixed_view() -> None:
    assert FixedView(3).bits([Need(1, 0.5, 0), Need(2, 0.1, 4)], VIEWS, 0.0) == [3, 3]


def test_popularity_leaves_decode_alone() -> None:
    assert PrefillPopularity().bits([Need(1, weight, 0) for weight in (0.5, 0.3, 0.15, 0.05)], VIEWS, 0.0) == [4] * 4


def test_gate_weighted_by_weight() -> None:
    needs = [Need(1, weight, 0) for weight in (0.45, 0.3, 0.17, 0.08)]  # 1.8, 1.2, 0.68 and 0.32 of the mean
    assert RoutingWeighted(0.5, 1.4, 1.6).bits(needs, VIEWS, 0.0) == [4, 3, 3, 2]
    assert RoutingWeighted(0.5, 0.5, 1.6).bits(needs, VIEWS, 0.0) == [4, 4, 4, 2]
    assert RoutingWeighted(0.5, 1.0, 1.6).bits(needs, [4, 8], 0.0) == [8, 8, 4, 4], "one shorter view"
    assert RoutingWeighted().bits([Need(1, 0.0, 0)] * 3, VIEWS, 0.0) == [2, 2, 2], "what weighs nothing needs nothing"


def test_gate_weighted_upgrades_only_the_heavy() -> None:
    needs = [Need(1, weight, held) for weight, held in ((0.45, 2), (0.3, 3), (0.17, 4), (0.08, 2))]
    assert RoutingWeighted(0.5, 1.0, 1.6).bits(needs, VIEWS, 0.0) == [4, 3, 4, 2]
    assert RoutingWeighted(0.5, 1.0, 1.0).bits(needs, VIEWS, 0.0) == [4, 4, 4, 2]


@given(needs_of)
def test_gate_weighted_reads_prompts_whole(needs: list[Need]) -> None:
    shared = [need._replace(num_tokens=need.num_tokens + 1) for need in needs]
    assert RoutingWeighted().bits(shared, VIEWS, 0.0) == [4] * len(needs)


def test_budget_spends_what_is_affordable_on_the_heaviest() -> None:
    needs = [Need(1, weight, held) for weight, held in ((0.1, 0), (0.5, 0), (0.3, 0), (0.1, 4))]
    assert Budget().bits(needs, VIEWS, 0.0) == [2, 2, 2, 4], "the shortest view, whatever it takes; what is there is used"
    assert Budget().bits(needs, VIEWS, 7.0) == [2, 3, 2, 4]
    assert Budget().bits(needs, VIEWS, 9.0) == [3, 3, 3, 4]
    assert Budget().bits(needs, VIEWS, 11.0) == [3, 4, 4, 4]
    assert Budget().bits(needs, VIEWS, 100.0) == [4, 4, 4, 4]


@given(needs_of, st.floats(0, 200))
def test_budget_reads_no_more_than_is_affordable_beyond_the_shortest(needs: list[Need], affordable: float) -> None:
    bits = Budget().bits(needs, VIEWS, affordable)
    read = sum(b - need.held for b, need in zip(bits, needs, strict=True))
    unavoidable = sum(2 for need in needs if not need.held)
    assert read <= max(affordable, unavoidable)
    assert all(b >= need.held for b, need in zip(bits, needs, strict=True))
