"""The README: its code runs as it stands, its table is the result page's, its links lead somewhere, and it stays short."""

from __future__ import annotations

import re
import shlex

import pytest

import fate_moe
from tests.docs.pages import DOCS, ROOT, blocks, script

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()


def test_it_is_one_screen_and_a_bit() -> None:
    assert len(README.splitlines()) < 80


def test_the_python_block_writes_text(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(README, "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(capsys.readouterr().out) > len("It was a dark night, and") + 64
    names["model"].fate.close()  # type: ignore[attr-defined]


def test_commands_are_verbs_and_targets() -> None:
    lines = [line.split(" # ")[0] for block in blocks(README, "sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.strip()]
    parser = script("reference").fate_parser()
    for command in commands:
        if command[0] == "fate":
            parser.parse_args(command[1:])  # exits where an option does not exist
        elif command[0] == "make":
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command[0] for command in commands} == {"fate", "make", "pip"}


def test_the_table_is_the_result_pages() -> None:
    """Every row is a row of the page that a command writes, and every cell but the first has one number."""
    rows = [line for line in README.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "results" / "benchmarks.md").read_text().splitlines()
    assert len(rows) == 5
    assert all(row in page for row in rows)
    for row in rows[2:]:
        assert all(re.fullmatch(r"[\d.]+", cell.strip()) for cell in row.strip("|").split("|")[1:])


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if not target.startswith("https://")]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("guide", ["python", "policy", "adapters"])
def test_the_guides_code_runs(guide: str) -> None:
    """Each Python block by itself, with the embedded model."""
    if "Engine" not in fate_moe.__all__:
        pytest.skip("the public face is not complete yet")
    for code in blocks((DOCS / "guides" / f"{guide}.md").read_text(), "python"):
        names: dict[str, object] = {}
        exec(compile(code, f"{guide}.md", "exec"), names)
        if (model := names.get("model")) is not None:
            model.fate.close()  # type: ignore[attr-defined]
