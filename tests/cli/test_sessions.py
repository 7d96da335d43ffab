"""Conversations that last: chat --session and sessions."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fate_moe import demo
from fate_moe.cli import chat, main
from fate_moe.errors import ConfigError, StoreError
from fate_moe.tools import sessions
from fate_moe.tools.answering import Answer, Answering
from fate_moe.tools.sessions import Session, delete_session, load_session, open_session, save_session, session_names

LONG = "Once upon a time there was a little mouse who lived in a house by the sea, and she asked the captain: " * 4


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own; the stores stay shared."""
    shared = Path(os.environ["FATE_HOME"])
    (shared / "stores").mkdir(parents=True, exist_ok=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "stores").symlink_to(shared / "stores")
    monkeypatch.setenv("FATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, list[Answer]]]:
    """Chat with these lines and options: what was printed, and the answers."""

    def talk(lines: Sequence[str], *options: str) -> tuple[str, list[Answer]]:
        left, given, answer = list(lines), list[Answer](), Answering.answer

        def noted(self: Answering, *arguments: object) -> Answer:
            given.append(answer(self, *arguments))  # type: ignore[arg-type]
            return given[-1]

        monkeypatch.setattr(chat, "_ask", lambda: left.pop(0) if left else None)
        monkeypatch.setattr(Answering, "answer", noted)
        capsys.readouterr()
        assert main(["chat", "--temperature", "0", "--precision", "int4", "--max-new-tokens", "9", *options]) == 0
        monkeypatch.setattr(Answering, "answer", answer)
        return capsys.readouterr().out, given

    return talk


@pytest.mark.slow
def test_a_conversation_goes_on_where_it_was(talk: Callable[..., tuple[str, list[Answer]]], home: Path) -> None:
    whole, answers = talk([LONG, "And then?", "Why?"], "--prefix-cache", "off")
    assert not (home / "kv").exists()
    assert [answer.cached_tokens for answer in answers] == [0, 0, 0]
    first, _ = talk([LONG, "And then?"], "--session", "sea")
    (home / "home.txt").write_text("")  # of a person
    second, (answer,) = talk(["Why?"], "--session", "sea")
    assert first + second == whole
    assert answer.cached_tokens >= 64 * ((answer.prompt_tokens - 20) // 64)
    session = load_session("sea")
    assert session is not None
    assert (session.turns, len(session.messages)) == (3, 6)
    assert session.options["precision"] == "int4"
    assert session.tokens > answer.prompt_tokens
    kept = [home / "kv" / name for name in session.kept]
    assert kept
    assert all(path.is_file() for path in kept)
    delete_session("sea")
    assert not any(path.exists() for path in kept)
    assert list((home / "sessions").iterdir()) == []


@pytest.mark.slow
def test_another_process_goes_on_without_reading_the_prompt_again(talk: Callable[..., tuple[str, list[Answer]]]) -> None:
    whole, (_, _, uninterrupted) = talk([3 * LONG, "And then?", "Why?"], "--prefix-cache", "off")
    first, _ = talk([3 * LONG, "And then?"], "--session", "sea")
    command = [sys.executable, "-m", "fate_moe", "chat", "--session", "sea", "-v"]
    done = subprocess.run(command, input="Why?\n", capture_output=True, text=True, timeout=240, check=True)
    assert first + done.stdout.replace("> ", "").rstrip() == whole.rstrip()
    found = re.search(r"(\d+) of (\d+) tokens were there", done.stderr)
    assert found is not None, done.stderr
    assert int(found[2]) == uninterrupted.prompt_tokens
    assert int(found[1]) >= 64 * ((int(found[2]) - 20) // 64) >= 256


@pytest.mark.slow
def test_within_a_chat_only_what_is_new_is_read(talk: Callable[..., tuple[str, list[Answer]]]) -> None:
    _, (first, second) = talk([LONG, "And then?"], "--prefix-cache-disk", "off")
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens - 64


def test_settings_are_the_sessions_unless_others_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def converse(arguments: argparse.Namespace, session: Session) -> None:
        seen.append(arguments)
        save_session(session)

    monkeypatch.setattr(chat, "_converse", converse)
    assert main(["chat", str(demo.MODEL), "--session", "a", "--temperature", "0.5", "--context-length", "512"]) == 0
    assert main(["chat", "--session", "a", "--top-k", "3"]) == 0
    assert main(["chat", "--session", "a", "--temperature", "1.5"]) == 0
    assert [(one.model, one.temperature, one.top_k, one.context_length) for one in seen] == [
        (str(demo.MODEL), 0.5, None, 512),
        (str(demo.MODEL), 0.5, 3, 512),
        (str(demo.MODEL), 1.5, 3, 512),
    ]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/abs", ".hidden", "a" * 65, "a\nb", "-x", "a b", "ä", "a\0"])
def test_a_name_leads_nowhere_else(name: str, home: Path) -> None:
    before = sorted(home.parent.rglob("*"))
    for use in (load_session, delete_session, lambda name: open_session(name).__enter__()):
        with pytest.raises(ConfigError, match="is no name of a session"):
            use(name)
    assert sorted(home.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"messages": [{"role": "user"}]}, {"kept": ["../../x"]}, {"options": []}, {"updated": "now"}, None]
)
def test_a_damaged_session_is_said_and_can_be_deleted(
    change: dict[str, object] | None, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Session("good", messages=[{"role": "user", "content": "hello"}])
    with open_session("bad") as session:
        save_session(session)
    save_session(save)
    path = home / "sessions" / "bad.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if change else path.read_text()[:-4])
    with pytest.raises(StoreError, match="is not a session"):
        load_session("bad")
    assert main(["chat", "--session", "bad"]) == 1
    assert main(["sessions", "list", "--json"]) == 0
    printed = capsys.readouterr()
    assert [one["name"] for one in json.loads(printed.out)["sessions"]] == ["good"]
    assert "bad.json is not a session" in printed.err
    assert main(["sessions", "delete", "bad"]) == 0
    assert session_names() == ["good"]


def test_a_session_is_one_processs_at_a_time() -> None:
    with open_session("a") as session:
        save_session(session)
        with pytest.raises(StoreError, match="open in another process"), open_session("a"):
            pass
        with pytest.raises(StoreError, match="open in another process"):
            delete_session("a")
    delete_session("a")
    with pytest.raises(ConfigError, match="there is no session a"):
        delete_session("a")


def test_sessions_are_shown_without_control_characters(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    said = [{"role": "user", "content": "hi\x1b[2J"}, {"role": "assistant", "content": "hello\n\nyou"}]
    save_path = home / "sessions"
    with open_session("a") as session:
        session.messages += said
        save_session(session)
    assert (save_path / "a.json").stat().st_mode & 0o077 == 0
    assert main(["sessions", "show", "a"]) == 0
    assert capsys.readouterr().out == "> hi␛[2J\nhello\n\nyou\n"
    assert main(["sessions", "export", "a"]) == 0
    assert "**assistant**\n\nhello" in capsys.readouterr().out
    assert main(["sessions", "export", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["messages"] == said
    assert main(["sessions", "list"]) == 0
    assert "just now" in capsys.readouterr().out
    assert main(["sessions", "show", "b"]) == 1


def test_a_session_that_cannot_be_written_does_not_end_the_talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sessions, "atomic_file", full)
    chat._keep(Session("a"))
    assert "session a could not be written" in capsys.readouterr().err
