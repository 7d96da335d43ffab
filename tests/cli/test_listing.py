"""``fate list`` and ``fate rm``."""

from __future__ import annotations

import fcntl
import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from fate_moe.cli import main
from fate_moe.store.home import store_used, stored_models


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A $FATE_HOME with a store, an unfinished conversion, a damaged store and a folder of somebody else's."""
    monkeypatch.setenv("FATE_HOME", str(tmp_path / "home"))
    stores = tmp_path / "home" / "stores"
    make_store(stores / "olmoe-int4-1")
    for name, file in (("other.partial", "journal.json"), ("torn", "fate.json"), ("notes", "mine.txt")):
        (stores / name).mkdir()
        (stores / name / file).write_text("[")
    return stores


def make_store(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "fate.json").write_text(json.dumps({"source": "allenai/OLMoE", "precision": "int4"}))
    (path / "experts-00001-of-00001.safetensors").write_bytes(bytes(10000))
    return path


def test_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == 1
    assert printed["home"] == str(home)
    named = {store["name"]: store for store in printed["stores"]}
    assert list(named) == ["olmoe-int4-1", "other.partial", "torn"]
    assert [store["state"] for store in printed["stores"]] == ["whole", "unfinished", "damaged"]
    whole = named["olmoe-int4-1"]
    assert (whole["source"], whole["precision"], whole["last_used"]) == ("allenai/OLMoE", "int4", None)
    assert whole["num_bytes"] == sum(file.stat().st_size for file in (home / "olmoe-int4-1").iterdir())
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for word in ("olmoe-int4-1", "allenai/OLMoE", "int4", "never", "unfinished", "damaged", str(home)):
        assert word in said.replace("\n", "")


def test_last_use(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = home / "olmoe-int4-1"
    before = time.time()
    store_used(store)
    used = next(found.last_used for found in stored_models() if found.name == store.name)
    assert used is not None
    assert before - 1 <= used <= time.time()
    os.utime(store / "last-used", (before - 7200, before - 7200))
    main(["list"])
    assert "2 hours ago" in capsys.readouterr().out
    store_used(store)
    main(["list"])
    assert "just now" in capsys.readouterr().out
    store_used(home / "there is none")  # a store that cannot be written to is used all the same


def test_no_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FATE_HOME", str(tmp_path / "none"))
    assert main(["list"]) == 0
    assert "no stores" in capsys.readouterr().out


def test_remove_by_name_and_path(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "-y", "olmoe-int4-1", str(home / "other.partial"), "torn"]) == 0
    assert capsys.readouterr().out.count("removed") == 3
    assert [path.name for path in home.iterdir()] == ["notes"]


def test_removing_asks_on_a_terminal(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for answer, stays in (("\n", True), ("n\n", True), ("", True), ("y\n", False)):
        stdin = io.StringIO(answer)
        monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["rm", "olmoe-int4-1"]) == 0
        assert "[y/N]" in capsys.readouterr().err
        assert (home / "olmoe-int4-1").exists() == stays


def refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", *arguments]) == 1
    assert says in capsys.readouterr().err


def test_what_is_not_removed(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = home / "olmoe-int4-1"
    (tmp_path / "link").symlink_to(store)
    (home / "torn" / "folder").mkdir()
    refused(["olmoe-int4-1"], "give -y", capsys)  # no terminal to ask on
    refused(["-y", "olmoe-int4-1", "notes"], "there is no store notes", capsys)
    refused(["-y", str(home / "notes")], "is not a store", capsys)
    refused(["-y", str(home)], "is not a store", capsys)
    refused(["-y", str(tmp_path / "link")], "is not a store", capsys)
    refused(["-y", "torn"], "holds folders", capsys)
    refused(["-y", "../stores/olmoe-int4-1"], "there is no store", capsys)
    handle = os.open(store, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    refused(["-y", "olmoe-int4-1"], "being written", capsys)
    os.close(handle)
    assert len(list(store.iterdir())) == 2
    assert {path.name for path in home.iterdir()} == {"olmoe-int4-1", "other.partial", "torn", "notes"}


def test_outside_of_home_only_with_yes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = make_store(tmp_path / "elsewhere")
    refused([str(outside)], "is outside", capsys)
    assert outside.exists()
    assert main(["rm", "-y", str(outside)]) == 0
    assert not outside.exists()


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"source": \xff}', b'{"source": 1' + b"0" * 5000 + b"}"])
def test_a_hostile_manifest_is_listed_as_damaged(home: Path, data: bytes) -> None:
    (home / "torn" / "fate.json").write_bytes(data)
    assert {model.name: model.state for model in stored_models()}["torn"] == "damaged"


def test_a_note_of_use_is_not_written_through_a_link(home: Path, tmp_path: Path) -> None:
    (home / "torn" / "last-used").symlink_to(tmp_path / "elsewhere")
    store_used(home / "torn")
    assert not (tmp_path / "elsewhere").exists()
    store_used(home / "olmoe-int4-1")
    assert (home / "olmoe-int4-1" / "last-used").exists()
