"""The picture of GPU cells: which cells become which line, and that it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.gpu_picture import curves, draw
from tests.support.pictures import labels, lines, num_colors, saved_figures

CELLS: dict[str, dict[str, Any]] = {
    "1.00 no prefetch": {"tokens_per_second": 200.0, "of_resident": 1.0},
    "0.25 best": {"tokens_per_second": 100.0, "of_resident": 0.5},
    "0.45 best": {"tokens_per_second": 140.0, "of_resident": 0.7},
    "0.15 best": {"why_not": "too few slots"},
    "0.25 bound": {"misses_per_token": 3.0, "of_resident": 0.8},
    "0.25 prefill 512 best": {"tokens_per_second": 1000.0},
}


def test_lines_go_from_whole_to_least() -> None:
    lines = curves(CELLS)
    assert list(lines["best"].items()) == [(1.0, 1.0), (0.45, 0.7), (0.25, 0.5)]
    assert lines["bound"] == {1.0: 1.0, 0.25: 0.8}


def test_a_picture_shows_the_lines(tmp_path: Path) -> None:
    with saved_figures() as figures:
        draw({"A, experts int4": {"cells": CELLS}, "nothing measured": {"cells": {}}}, tmp_path / "gpu.png")
    figure = figures["gpu.png"]
    assert labels(figure) == [("experts in VRAM, %", "decode speed, % of fully resident")], (
        "one panel: of the other nothing is known"
    )
    shown = lines(figure.axes[0])
    assert shown.keys() == {"best", "no prefetch", "bound of the link", "goal"}
    assert shown["best"] == [(100.0, 100.0), (45.0, pytest.approx(70.0)), (25.0, 50.0)]
    assert figure.axes[0].get_title() == "A, experts int4: 100 % is 200 tokens/s"
    assert num_colors(tmp_path / "gpu.png") > 10
