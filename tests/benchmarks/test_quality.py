"""The quality page's measurements: its table of errors, and that tables and picture need the JSON alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import weight_errors
from benchmarks.quality_page import TITLES, draw, fill_page
from tests.support.pictures import lines, num_colors, saved_figures

DOCS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.slow
def test_weight_errors_are_ordered() -> None:
    rows = weight_errors()
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        assert row["weights_8"] < row["weights_4"] < row["weights_3"] < row["weights_2"]
    for minmax, hqq in ((a, b) for a in rows for b in rows if (a["solver"], b["solver"]) == ("minmax", "hqq")):
        if (minmax["model"], minmax["group_size"]) == (hqq["model"], hqq["group_size"]):
            assert hqq["weights_4"] < minmax["weights_4"]


@pytest.mark.slow
def test_the_picture_is_drawn_from_the_published_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    facts = json.loads((DOCS / "quality.json").read_text())
    with saved_figures() as figures:
        draw(facts, tmp_path / "quality.png")
    panels = [axes for axes in figures["quality.png"].axes if axes.axison]
    measured = [of_model[kind] for of_model in facts["models"].values() for kind in TITLES if of_model[kind]]
    assert len(panels) == len(measured)
    for axes, found in zip(panels, measured, strict=True):
        shown = lines(axes)
        assert shown.keys() == {line["name"] for line in found}
        for line in found:
            assert shown[line["name"]][0][0] == pytest.approx(line["bytes_per_token"] / 1024)
        assert shown["lossless"][0][1] == 0.03
        assert "read per token" in axes.get_xlabel()
        assert "perplexity" in axes.get_ylabel()
    assert num_colors(tmp_path / "quality.png") > 10


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
