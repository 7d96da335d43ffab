"""Why there is no tokenizer: missing, torn, in need of a package or of code."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fate_moe import demo
from fate_moe.engine.tokenizer import load_tokenizer
from fate_moe.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / name, tmp_path)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tokenizer_is_said_as_such(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json" in refused(folder)
    (folder / "tokenizer_config.json").unlink()
    assert f"{folder} has no tokenizer" in refused(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_torn_tokenizer_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    assert f"{name} is damaged" in refused(folder)


def test_a_tokenizer_of_another_form_is_refused_in_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be loaded" in refused(folder)


@pytest.mark.parametrize(("name", "package"), [("tokenizer.model", "sentencepiece"), ("qwen.tiktoken", "tiktoken")])
def test_a_package_that_a_tokenizer_needs_is_named(folder: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").rename(folder / name)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda of, *more: None if of == package else find(of, *more))
    said = refused(folder)
    assert f"it needs the package {package}" in said


def test_a_tokenizer_that_needs_code_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "vocab.txt")
    config: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["tokenization_theirs.Theirs", None]}, "tokenizer_class": "Theirs"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_theirs.py").write_text("raise SystemExit('the code of a checkpoint was run')")
    assert "it needs the checkpoint's own code, which is never run" in refused(folder)
