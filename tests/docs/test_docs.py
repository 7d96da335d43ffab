"""The site's sources: named tests and files exist, commands parse, generated parts say what the code says."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from fate_moe import errors
from fate_moe.config import OffloadConfig
from tests.docs.pages import DOCS, ROOT, blocks, script

PAGES = [ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# Pages for users: everything but what the notebook tells of the past.
USER_PAGES = [page for page in PAGES if "notebook" not in page.parts]


def test_every_guarantee_names_tests_that_exist() -> None:
    text = (DOCS / "guarantees.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    names = [
        "Same numbers",
        "The budget is a promise",
        "Never slower than not trying",
        "Honest counters",
        "Files are hostile until checked",
        "Nothing is lost",
        "Imports point one way",
    ]
    assert list(sections)[:7] == names
    for name in names:
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", sections[name])
        assert tests, f"{name} has no test"
        for path, function in tests:
            assert (ROOT / path).exists(), f"{name}: {path}"
            assert f"def {function}(" in (ROOT / path).read_text() if function else True, f"{name}: {path}::{function}"


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths in code marks: of the project, or of src/fate_moe."""
    named = re.findall(r"`((?:tests|benchmarks|recipes|examples|docs|[a-z]+)/[\w/.-]+\.(?:py|md|svg|json))", page.read_text())
    wrong = [name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "src" / "fate_moe"))]
    assert wrong == []


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    """Every line of a shell block that begins with ``fate``."""
    parser = script("reference").fate_parser()
    for block in blocks(page.read_text(), "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fate"]:
                if ">" in words:
                    words = words[: words.index(">")]
                parser.parse_args(words[1:])  # exits where a verb or an option does not exist


def test_the_command_line_page_has_every_verb_and_option() -> None:
    reference = script("reference")
    text = reference.command_line()
    for name, parser in reference.verbs(reference.fate_parser()).items():
        assert f"## {name}\n" in text
        for action in parser._actions:
            assert all(f"`{option}`" in text for option in action.option_strings if option not in ("-h", "--help"))


def test_the_options_page_describes_every_field() -> None:
    lines = script("reference").options().splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == [field.name for field in fields(OffloadConfig)]
    assert all(len(line.rsplit("|", 2)[1].strip()) > 10 for line in lines)


def test_the_errors_page_has_every_error() -> None:
    text = script("reference").error_tree()
    assert all(f"## {name}\n" in text for name in errors.__all__)


def test_choices_are_listed() -> None:
    reference = script("reference")
    for part, name in (("policies", "lru"), ("predictors", "cross-layer"), ("presets", "best"), ("precisionpolicies", "full")):
        assert f"| `{name}` |" in reference.PARTS[part]()


def test_a_simple_table_is_read() -> None:
    text = "Before\n\n====  =====\nname  means\n====  =====\nA     one\n      more\nB     two\n====  =====\n"
    assert script("reference").simple_table(text) == [["name", "means"], ["A", "one more"], ["B", "two"]]


def test_every_environment_variable_is_listed() -> None:
    """Each FATE_* variable that the sources read is on the page."""
    if importlib.util.find_spec("fate_moe.switches") is None:
        pytest.skip("no switches yet")
    page = script("reference").environment()
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert set(re.findall(r"\"(FATE_[A-Z]+)\"", sources)) <= set(re.findall(r"`(FATE_[A-Z]+)`", page))


def test_markers_are_replaced_and_unknown_ones_refused() -> None:
    reference = script("reference")
    for page in PAGES:
        assert "<!-- generate:" not in reference.on_page_markdown(page.read_text())
    with pytest.raises(KeyError):
        reference.on_page_markdown("<!-- generate: nothing -->")


def test_the_picture_is_what_the_script_draws() -> None:
    assert (DOCS / "concepts" / "one-token.svg").read_text() == script("one_token").draw()


def test_guides_hold_no_measurement() -> None:
    """A guide says what to do; speeds are in results and notebook."""
    for page in [*(DOCS / "guides").glob("*.md"), *(DOCS / "start").glob("*.md")]:
        assert not re.search(r"\d (?:tokens/s|tok/s|GB/s)", page.read_text()), page


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if f" {page.relative_to(DOCS)}\n" not in navigation]
    assert missing == []
