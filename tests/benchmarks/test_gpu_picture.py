"""The picture of GPU cells: which cells become which line, and that it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.gpu_picture import curves, draw

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


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw({"A, experts int4": {"cells": CELLS}, "nothing measured": {"cells": {}}}, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 5000
