"""When reading ahead is tried, kept and left."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fate_moe.core import Counters, ExpertId
from fate_moe.predict.prefetcher import Prefetcher, Trial


class Idle:
    """Slots from which nothing is ever missing."""

    read_seconds = 0.001
    holds_all = False

    def __init__(self) -> None:
        self.counters = Counters()

    def prefetch(self, expected: Sequence[ExpertId], most: int | None = None, probabilities: Sequence[float] | None = None) -> int:
        return 0

    def missing(self, experts: Sequence[ExpertId]) -> list[bool]:
        return [False] * len(experts)

    def cancel_prefetches(self) -> None:
        """There are none."""


class Dear:
    """A predictor that takes a second to say one thing, and counts how often it is asked and told."""

    gives_probabilities = True

    def __init__(self) -> None:
        self.now, self.asked, self.told = 1.0, 0, 0

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        self.now, self.asked = self.now + 1, self.asked + 1
        return [(0, 0.5)]

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        self.told += 1


def run(trial: Trial, seconds: dict[bool, float], tokens: int) -> list[bool]:
    """So many tokens that take ``seconds`` by way; which way each went."""
    ways, now, way = [], 1.0, True
    for _ in range(tokens):
        way = trial.token(now)
        ways.append(way)
        now += seconds[way]
    return ways


@pytest.mark.parametrize("pays", [True, False])
def test_the_faster_way_is_kept(pays: bool) -> None:
    ways = run(Trial(), {True: 1.0 if pays else 1.2, False: 1.2 if pays else 1.0}, 1000)
    assert {True, False} == set(ways[:30]), "both are tried"
    assert ways[30:].count(pays) / len(ways[30:]) > 0.9


def test_it_changes_its_mind() -> None:
    trial = Trial()
    assert run(trial, {True: 1.0, False: 2.0}, 400)[-1]
    assert not all(run(trial, {True: 3.0, False: 2.0}, 600)[-50:])


def test_predicting_that_takes_longer_than_what_it_saves_is_left() -> None:
    """The tokens look faster with it, but there is less to save than it takes: that was noise."""
    trial, now, lost, ways = Trial(), 1.0, 0.0, []
    for _ in range(400):
        way = trial.token(now, lost)
        ways.append(way)
        now += 0.9 if way else 1.0
        lost += 0.05 if way else 0.01
    assert ways[40:].count(False) > 0.9 * len(ways[40:])


def test_what_paid_while_slots_filled_is_left_soon_after() -> None:
    """The first 30 tokens wait long without reading ahead; later ones hardly, and predicting takes longer."""
    trial, now, lost, ways = Trial(), 1.0, 0.0, []
    for token in range(160):
        way = trial.token(now, lost)
        ways.append(way)
        waited = 0.3 if token < 30 else 0.002
        now += 1.005 if way else 1.0 + waited
        lost += 0.005 if way else waited
    assert ways[26:30] == [True] * 4
    assert ways[70:].count(True) < 10


def test_nothing_is_tried_that_cannot_win() -> None:
    """Without reading ahead 0.01 is lost a token, predicting takes 0.05: it is tried for a block, and again when more is lost."""
    trial, now, lost, spent, ways = Trial(), 1.0, 0.0, 0.0, []
    for token in range(1400):
        way = trial.token(now, lost, spent)
        ways.append(way)
        waited = 0.01 if token < 800 else 0.3
        now += 1.05 if way else 1.0 + waited
        lost += 0.05 if way else waited
        spent += 0.05 if way else 0.0
    assert ways[:800].count(True) <= 2 * Trial.BLOCK
    assert ways[800:].count(True) > 0.6 * 600


def test_a_pause_is_not_a_token() -> None:
    trial = Trial()
    now = 1.0
    for index in range(200):
        if index % 7 == 0:
            trial.pause()
            now += 1000
        now += 1.0 if trial.token(now) else 2.0
    assert trial.prefetching


def test_a_predictor_that_cannot_win_is_left_alone() -> None:
    """Nothing is waited for: after the first block it is neither asked nor told, and nothing is said to be predicted."""
    predictor = Dear()
    prefetcher = Prefetcher(Idle(), predictor, 3, lambda: predictor.now)
    for _ in range(500):
        prefetcher.embedded(torch.zeros(1, 4))
        for layer in range(3):
            prefetcher.entered(layer, 1)
            prefetcher.look_ahead(layer, torch.zeros(1, 4))
            prefetcher.observe(layer, [0])
        predictor.now += 0.01
    assert (predictor.asked, predictor.told) == (3 * Trial.BLOCK, 3 * Trial.BLOCK)
    assert not prefetcher.predicted
    for _ in range(50):  # passes with drafts between them are tried by themselves
        for num_tokens in (9, 1, 3):
            prefetcher.embedded(torch.zeros(num_tokens, 4))
            predictor.now += 0.01
    assert predictor.asked == 3 * Trial.BLOCK + 2 * Trial.BLOCK
    prefetcher.embedded(torch.zeros(90, 4))
    assert predictor.asked == 5 * Trial.BLOCK + 1, "a prompt is another matter"
