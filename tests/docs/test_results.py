"""The benchmark page is what its result files say, with one number a cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import paper
from benchmarks.__main__ import HEADER
from benchmarks.report import markdown
from benchmarks.results import Results

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FILES = sorted(RESULTS.glob("*/*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_page_is_written_from_the_result_files(file: Path) -> None:
    page = (RESULTS / "benchmarks.md").read_text()
    assert page.startswith(HEADER)
    assert markdown(Results.load(file)) in page


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/paper/*.json")), ids=lambda file: f"{file.parents[1].name}-{file.stem}")
def test_the_papers_page_is_written_from_its_result_files(file: Path) -> None:
    page = (RESULTS / "paper.md").read_text()
    assert page.startswith(paper.HEADER)
    assert paper.markdown(Results.load(file)).rstrip() in page


@pytest.mark.parametrize("name", ["benchmarks", "gpu", "paper", "quality"])
def test_rows_of_a_table_have_as_many_cells_as_its_head(name: str) -> None:
    columns = 0
    for line in (RESULTS / f"{name}.md").read_text().splitlines():
        found = line.count("|") if line.startswith("|") else 0
        assert not columns or not found or found == columns, line
        columns = found


@pytest.mark.parametrize("name", ["benchmarks", "gpu", "quality"])
def test_a_cell_has_one_number(name: str) -> None:
    """Cells that begin with a number have no other, but for its unit and, of solvers and groups, its name."""
    for line in (RESULTS / f"{name}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        for cell in cells:
            if re.match(r"[+-]?[\d.]", cell) and "view" not in cell:
                assert len(re.findall(r"[\d.,]+", cell)) == 1, line
