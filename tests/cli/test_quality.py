"""fate eval, as a person or a program uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fate_moe import demo
from fate_moe.cli import main

pytestmark = pytest.mark.slow

BOOKS = str(Path(__file__).parents[1] / "data" / "heldout-books.txt")


def test_perplexity_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", BOOKS, "--max-tokens", "300", "--window", "128", "--json"]
    assert main(["eval", "perplexity", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 299
    assert 10 < found["perplexity"] < 100  # the embedded model's own README says about 30
    assert found["window"] == 128
    assert found["bytes_read_per_token"] > 0
    assert found["config"]["precision"] == "lossless"
    assert main(["eval", "perplexity", *options, "--stride", "32"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] < found["perplexity"], "more context, better guesses"


@pytest.mark.slow
def test_compare_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", BOOKS, "--max-tokens", "200", "--precision", "int4"]
    assert main(["eval", "compare", str(demo.MODEL), *options]) == 0
    out = capsys.readouterr().out
    assert "KL divergence" in out
    assert "same likeliest token" in out


@pytest.mark.slow
def test_compare_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", BOOKS, "--max-tokens", "200", "--precision", "int4", "--json"]
    assert main(["eval", "compare", str(demo.MODEL), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 199
    assert 0 < found["kl_divergence"] < 0.1
    assert 0.8 < found["top1_agreement"] < 1
    assert found["perplexity_difference"] == pytest.approx(found["perplexity_b"] / found["perplexity_a"] - 1)


def test_a_text_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "perplexity", "--text", "/nowhere/text"]) == 1
    assert "/nowhere/text cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("most", ["-5", "0", "1"])
def test_too_few_tokens_are_said(most: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "perplexity", "--text", BOOKS, "--max-tokens", most]) == 1
    assert "at least 2" in capsys.readouterr().err
