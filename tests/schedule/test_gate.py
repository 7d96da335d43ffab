"""The gate loses no more than it may, and takes what pays."""

from __future__ import annotations

import random

import pytest

from fate_moe.schedule.gate import Gate, Offer


def run(
    row_cost: float, chance: float, tokens: int = 4000, draft_seconds: float = 0.0, most: int = 8, seed: int = 0, texts: int = 1
) -> tuple[float, Gate]:
    """Seconds a token beside not drafting, where a further row costs ``row_cost`` passes without drafts.

    Of several texts only the first one's drafts are ever right.
    """
    draw, gate = random.Random(seed), Gate(most)
    made, spent = 0, 0.0
    while made < tokens:
        counts = gate.choose([Offer(most, text, draft_seconds) for text in range(texts)])
        accepted = [0] * texts
        while accepted[0] < counts[0] and draw.random() < chance:
            accepted[0] += 1
        seconds, drafting = (1 + row_cost * sum(counts)) * draw.uniform(0.95, 1.05), sum(counts) * draft_seconds
        gate.passed(seconds, counts, accepted, range(texts), drafting)
        spent += seconds + drafting
        made += texts + sum(accepted)
    return spent * texts / made, gate


@pytest.mark.parametrize("row_cost", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("chance", [0.0, 0.05])
def test_what_does_not_pay_costs_less_than_a_hundredth(row_cost: float, chance: float) -> None:
    per_token, gate = run(row_cost, chance)
    assert per_token < 1.01
    assert gate.probes, "the figures were kept fresh"


@pytest.mark.parametrize(("row_cost", "chance"), [(0.1, 0.9), (0.1, 0.5), (0.5, 0.9), (0.02, 1.0)])
def test_what_pays_is_taken(row_cost: float, chance: float) -> None:
    """Within a tenth of the best fixed k, of which measuring costs some."""
    best = min((1 + row_cost * k) / sum(chance**j for j in range(k + 1)) for k in range(9))
    per_token, _ = run(row_cost, chance)
    assert per_token < 1.1 * best


@pytest.mark.parametrize(("row_cost", "chance"), [(0.5, 0.05), (0.05, 0.9), (0.3, 0.6)])
def test_of_several_texts_those_are_drafted_for_whose_drafts_are_right(row_cost: float, chance: float) -> None:
    best = min((1 + row_cost * k) / ((3 + sum(chance**j for j in range(1, k + 1))) / 3) for k in range(9))
    per_token, _ = run(row_cost, chance, texts=3)
    assert per_token < 1.02 * best


def test_the_better_of_two_sources() -> None:
    gate = Gate()
    for _ in range(10):
        gate.passed(1.0)
        gate.passed(1.1, (4,), (4,), ("right",))
        gate.passed(1.1, (4,), (0,), ("wrong",))
    assert gate.better([Offer(4, "right"), Offer(8, "wrong")]) == 0
    assert gate.better([Offer(4, "wrong"), Offer(1, "right")]) == 1
    assert gate.better([Offer(4, "right", 2.0), Offer(1, "right")]) == 1, "drafting takes too long"


def test_a_dear_draft_is_not_asked_for() -> None:
    assert run(0.0, 0.5, draft_seconds=1.0)[0] < 1.01


def test_acceptance_that_changes_is_followed() -> None:
    gate = Gate()
    for _ in range(10):
        gate.passed(1.0)
    for _ in range(50):
        gate.passed(1.1, (4,), (4,))
    assert gate.choose([Offer(4)]) == [4]
    for _ in range(50):
        gate.passed(1.1, (4,), (0,))
    assert gate.choose([Offer(4)]) == [0] or gate._is_probe
    assert gate.acceptance()[0] < 0.05


def test_a_bad_moment_is_not_remembered_for_ever() -> None:
    """The first passes of eight drafts met another program; that is noticed though four pay as well."""
    gate, chosen = Gate(), list[int]()
    for index in range(3000):
        count = gate.choose([Offer(8)])[0]
        slow = 5.0 if index < 60 and count == 8 else 1.0
        gate.passed((1 + 0.05 * count) * slow, (count,), (count,))
        chosen.append(count)
    assert chosen[-500:].count(8) > 450


def test_nothing_is_drafted_before_a_single_pass_was_timed() -> None:
    assert Gate().choose([Offer(4)]) == [0]
