"""The number of reads to make, computed by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.predict.reliability import isotonic
from fate_moe.predict.rule import WASTE, num_reads


@pytest.mark.parametrize(
    ("probabilities", "window", "read", "expected"),
    [
        ([1.0, 1.0, 1.0], 2.5, 1.0, 3),  # the third is half done in time
        ([1.0, 1.0, 1.0, 1.0], 2.5, 1.0, 3),  # the fourth would begin too late
        ([0.9], 0.0, 1.0, 0),  # no time at all
        ([0.19], 1.0, 1.0, 0),  # complete in time: p > (1 - p) / 4 means p > 0.2
        ([0.21], 1.0, 1.0, 1),
        ([0.55], 0.5, 1.0, 0),  # half in time: 0.5 p > (1 - p) (0.5 + 0.25) means p > 0.6
        ([0.65], 0.5, 1.0, 1),
        ([], 1.0, 1.0, 0),
    ],
)
def test_by_hand(probabilities: list[float], window: float, read: float, expected: int) -> None:
    assert WASTE == 0.25
    assert num_reads(probabilities, window, read) == expected


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0, 10), st.floats(0.01, 10))
def test_more_time_never_means_fewer_reads(probabilities: list[float], window: float, read: float) -> None:
    likeliest_first = sorted(probabilities, reverse=True)
    assert num_reads(likeliest_first, window, read) <= num_reads(likeliest_first, 2 * window, read)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.5, 60)), min_size=1, max_size=20))
def test_isotonic_does_not_decrease_and_keeps_the_total(bins: list[tuple[float, float]]) -> None:
    import numpy as np

    counts = np.array([count for _, count in bins], np.float32)
    hits = np.minimum(np.array([hit for hit, _ in bins], np.float32), counts)
    rates = isotonic(hits, counts)
    assert (np.diff(rates) >= 0).all()
    assert float((rates * counts).sum()) == pytest.approx(float(hits.sum()), rel=1e-4, abs=1e-4)


def test_isotonic_by_hand() -> None:
    import numpy as np

    assert isotonic(np.array([1, 0, 3], np.float32), np.array([2, 2, 4], np.float32)).tolist() == [0.25, 0.25, 0.75]
