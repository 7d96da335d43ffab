"""The quality page's measurements: its table of errors, and that tables and picture need the JSON alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import weight_errors
from benchmarks.quality_page import draw, fill_page

DOCS = Path(__file__).parents[2] / "docs" / "results"


def test_weight_errors_are_ordered() -> None:
    rows = weight_errors()
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        assert row["weights_8"] < row["weights_4"] < row["weights_3"] < row["weights_2"]
    for minmax, hqq in ((a, b) for a in rows for b in rows if (a["solver"], b["solver"]) == ("minmax", "hqq")):
        if (minmax["model"], minmax["group_size"]) == (hqq["model"], hqq["group_size"]):
            assert hqq["weights_4"] < minmax["weights_4"]


def test_the_picture_is_drawn_from_the_published_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(json.loads((DOCS / "quality.json").read_text()), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    """Filling the page from the published numbers changes nothing, and other numbers change it."""
    page, facts = (DOCS / "quality.md").read_text(), json.loads((DOCS / "quality.json").read_text())
    copy = tmp_path / "quality.md"
    copy.write_text(page)
    fill_page(facts, copy)
    assert copy.read_text() == page
    facts["models"]["embedded"]["windows"][0]["perplexity"] = 1234.5
    fill_page(facts, copy)
    assert "| lossless | 1234.50 | +0.0% |" in copy.read_text()
