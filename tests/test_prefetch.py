"""When reading ahead is tried, kept and left."""

from __future__ import annotations

import pytest

from fate_moe.prefetch import Trial


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


def test_a_pause_is_not_a_token() -> None:
    trial = Trial()
    now = 1.0
    for index in range(200):
        if index % 7 == 0:
            trial.pause()
            now += 1000
        now += 1.0 if trial.token(now) else 2.0
    assert trial.reading_ahead
