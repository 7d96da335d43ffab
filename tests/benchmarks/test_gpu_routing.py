"""What no choice of victims can avoid, against trying all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("triton")

from benchmarks.gpu_routing import belady_misses

EXPERTS, TOKENS = 4, 5


def fewest(choices: list[set[int]], resident: frozenset[int]) -> int:
    """By trying every set of experts to keep."""
    if not choices:
        return 0
    now, *later = choices
    missing = len(now - resident)
    keeps = itertools.combinations(resident - now, len(resident) - len(now))
    return missing + min(fewest(later, frozenset(now) | frozenset(kept)) for kept in keeps)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("quota", [2, 3])
def test_belady_misses_least(seed: int, quota: int) -> None:
    random = np.random.default_rng(seed)
    choices = np.stack([[random.permutation(EXPERTS)[:2] for _ in range(TOKENS)] for _ in range(2)])
    expected = sum(fewest([set(token.tolist()) for token in layer], frozenset(range(quota))) for layer in choices)
    assert belady_misses(choices, [quota, quota], EXPERTS, 0) == pytest.approx(expected / TOKENS)
    assert belady_misses(choices, [EXPERTS, EXPERTS], EXPERTS, 0) == 0
