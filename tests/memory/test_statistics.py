"""Expected uses per token: by hand, and against what the trace does next."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.errors import ConfigError
from fate_moe.memory import statistics as statistics_module
from fate_moe.memory.statistics import DECAYS, MAX_TABLE_BYTES, CoActivation, RoutingStatistics


def test_expected_uses_are_the_mean_of_decayed_means() -> None:
    statistics = RoutingStatistics([3], co_activation=False)
    for experts in ([0], [1], [0, 2]):
        statistics.routed(0, experts)
    for expert, ages in ((0, (0, 2)), (1, (1,)), (2, (0,))):
        expected = np.mean([sum((1 - decay) * decay**age for age in ages) for decay in DECAYS])
        assert statistics.expected_uses[0, expert] == pytest.approx(expected, rel=1e-5)


def test_many_tokens_count_by_their_shares() -> None:
    statistics = RoutingStatistics([3], co_activation=False)
    statistics.routed(0, [0, 1], [4000, 1000], 4000)
    assert statistics.expected_uses[0].tolist() == pytest.approx([1.0, 0.25, 0.0], abs=1e-3)


def test_what_follows_is_expected_more() -> None:
    """Ten pairs of groups of four, in random order, the second of a pair always after the first: it is expected then."""
    ranks = {}
    for co_activation in (False, True):
        rng, statistics, found = np.random.default_rng(0), RoutingStatistics([80, 80], co_activation=co_activation), []
        for step in range(400):
            first = int(rng.integers(10))
            for group in (2 * first, 2 * first + 1):
                for layer in range(2):
                    statistics.routed(layer, list(range(4 * group, 4 * group + 4)))
                if step > 200 and group == 2 * first:
                    odd = statistics.expected_uses[1].reshape(20, 4).sum(1)[1::2]
                    found.append(int((odd > odd[first]).sum()))
        ranks[co_activation] = np.mean(found)
    assert ranks[True] < 1 < 3 < ranks[False]


def test_tables_that_would_be_large_are_omitted() -> None:
    assert MAX_TABLE_BYTES < 58 * 256 * 256 * 8
    assert "follows" not in RoutingStatistics([256] * 58).state()
    assert "follows" in RoutingStatistics([64] * 26).state()


def test_when_it_is_counted_does_not_matter() -> None:
    rng, asked, unasked = np.random.default_rng(0), RoutingStatistics([6] * 3), RoutingStatistics([6] * 3)
    for token in range(60):
        for layer in range(3):
            experts = rng.choice(6, 2, replace=False).tolist()
            many: dict[str, Any] = {"counts": [3, 1], "num_tokens": 4} if token % 20 == 7 else {}
            for statistics in (asked, unasked):
                statistics.routed(layer, experts, **many)
            assert (asked.expected_uses >= 0).all()
    np.testing.assert_allclose(
        asked.expected_uses, unasked.expected_uses, rtol=1e-3
    )  # the slope is learned layer by layer, or token by token


@pytest.mark.skipif(statistics_module.native is None, reason="the extension is not built")
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_the_extension_counts_as_numpy_does(seed: int, num_layers: int, width: int, co_activation: bool) -> None:
    """Whatever comes: tokens of other numbers of experts, prompts, layers left out, a restored state."""
    rng = np.random.default_rng(seed)
    extension, numpy = (RoutingStatistics([width] * num_layers, co_activation=co_activation) for _ in range(2))
    for token in range(12):
        top_k, skipped = min(width, 1 + token // 5), rng.integers(num_layers + 1)
        for layer in range(num_layers):
            if layer == skipped:
                continue
            experts = rng.choice(width, top_k, replace=False).tolist()
            num_tokens = 3 if rng.random() < 0.1 else 1
            extension.routed(layer, experts, None, num_tokens)
            with mock.patch.object(statistics_module, "native", None):
                numpy.routed(layer, experts, None, num_tokens)
                np.testing.assert_allclose(extension.value, numpy.value, rtol=1e-4)
        np.testing.assert_allclose(extension.expected_uses, numpy.expected_uses, rtol=1e-4)
    for name, array in numpy.state().items():
        np.testing.assert_allclose(extension.state()[name], array, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(statistics_module.native is None, reason="the extension is not built")
@pytest.mark.parametrize(("layer", "experts"), [(3, [0, 1]), (-1, [0, 1]), (0, [0, 6]), (0, [-1, 1])])
def test_the_extension_refuses_what_does_not_exist(layer: int, experts: list[int]) -> None:
    with pytest.raises(IndexError):
        RoutingStatistics([6] * 3).routed(layer, experts)


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True), max_size=40), st.integers(0, 3))
def test_expected_uses_are_positive_and_a_prompt_in_between_does_no_harm(tokens: list[list[int]], prompt_at: int) -> None:
    statistics = RoutingStatistics([5, 5])
    for index, experts in enumerate(tokens):
        for layer in range(2):
            if index % 4 == prompt_at:
                statistics.routed(layer, [0, 1, 2, 3, 4], [3, 1, 1, 1, 2], 4)
            else:
                statistics.routed(layer, experts)
    assert np.isfinite(statistics.expected_uses).all()
    assert (statistics.expected_uses >= 0).all()


def test_state_goes_on_where_it_was() -> None:
    rng = np.random.default_rng(0)
    tokens = [[rng.choice(6, 2, replace=False).tolist() for _ in range(3)] for _ in range(60)]
    first, second = RoutingStatistics([6] * 3), RoutingStatistics([6] * 3)
    for token in tokens:
        for layer, experts in enumerate(token):
            first.routed(layer, experts)
    second.restore({name: array.copy() for name, array in first.state().items()})
    for statistics in (first, second):
        for token in tokens[:20]:
            for layer, experts in enumerate(token):
                statistics.routed(layer, experts)
    np.testing.assert_allclose(first.expected_uses, second.expected_uses, rtol=0.2, atol=0.02)  # but for the tokens across the gap


@pytest.mark.parametrize("damage", ["absent", "shape", "dtype", "nan", "negative"])
def test_foreign_state_is_refused_and_changes_nothing(damage: str) -> None:
    statistics = RoutingStatistics([6] * 3)
    state = {name: array.copy() for name, array in RoutingStatistics([6] * 3).state().items()}
    if damage == "absent":
        del state["recent"]
    elif damage == "shape":
        state["recent"] = state["recent"][:2]
    elif damage == "dtype":
        state["recent"] = state["recent"].astype(np.float64)
    else:
        state["recent"][0] = np.nan if damage == "nan" else -1
    before = {name: array.copy() for name, array in statistics.state().items()}
    with pytest.raises(ConfigError, match="not used"):
        statistics.restore(state)
    for name, array in statistics.state().items():
        assert np.array_equal(array, before[name])


def test_there_is_little_evidence_in_independent_tokens() -> None:
    rng = np.random.default_rng(1)
    evidence, frequency = CoActivation(1, 8), np.full((1, 8), 0.25, np.float32)
    chances = [evidence.routed(np.array([0]), frequency, rng.choice(8, 2, replace=False)[None]) for _ in range(3000)]
    np.testing.assert_allclose(np.mean(chances[1000:], (0, 1)), 0.25, atol=0.03)
    assert np.std(chances[1000:]) < 0.12


def test_another_layers_choice_is_evidence() -> None:
    """What layer 1 chooses is what layer 0 chose a token before: known as soon as layer 0 has chosen."""
    rng, statistics, before = np.random.default_rng(2), RoutingStatistics([8, 8]), 0
    ranks = []
    for step in range(600):
        now = int(rng.integers(8))
        if step > 300:
            ranks.append(int((statistics.expected_uses[1] > statistics.expected_uses[1, before]).sum()))
        statistics.routed(0, [now])
        statistics.routed(1, [before])
        before = now
    assert np.mean(ranks) < 0.1


def test_what_comes_sooner_has_more_value() -> None:
    statistics = RoutingStatistics([4, 4, 4, 4], co_activation=False)
    for _ in range(50):
        for layer in range(4):
            statistics.routed(layer, [0])
    statistics.routed(0, [0])
    statistics.routed(1, [0])
    assert statistics.value[2, 1] > statistics.value[3, 1] > statistics.value[0, 1] > statistics.value[1, 1] > 0
    assert statistics.value[1, 0] > statistics.value[2, 1]


def test_another_number_of_choices_begins_anew() -> None:
    statistics = RoutingStatistics([6, 6])
    for experts in ([0, 1], [2], [3, 4, 5], [0, 1]):
        for layer in range(2):
            statistics.routed(layer, experts)
        assert np.isfinite(statistics.value).all()
