"""Which argument of ``fate run`` is the model and which the prompt, and what a prompt may be made of. No model is loaded."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe import demo
from fate_moe.cli import build_parser, chat, text
from fate_moe.errors import ConfigError
from fate_moe.tools.answering import Answer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def meant(*arguments: str) -> tuple[str | None, str]:
    parsed: argparse.Namespace = build_parser().parse_args(["run", *arguments])
    return text._model_and_prompt(parsed)


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())


@contextmanager
def piped(data: bytes) -> Iterator[None]:
    """``data`` | fate ..."""
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    with open(reading, encoding="utf-8") as stdin, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        yield


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (None, demo.PROMPT)),
        (["Once upon a time"], (None, "Once upon a time")),
        (["Hello"], (None, "Hello")),
        (["a choice of this/that, always"], (None, "a choice of this/that, always")),
        (["x" * 5000], (None, "x" * 5000)),
        (["-p", "Hello"], (None, "Hello")),
        (["--prompt", "org/name"], (None, "org/name")),
        (["org/name", "-p", "Hello"], ("org/name", "Hello")),
        (["org/name", "Hello"], ("org/name", "Hello")),
        (["anything", "Hello"], ("anything", "Hello")),
        (["model.gguf", "Hello"], ("model.gguf", "Hello")),
    ],
)
def test_what_is_the_model(arguments: list[str], expected: tuple[str | None, str]) -> None:
    assert meant(*arguments) == expected


def test_a_word_that_may_be_a_misspelt_model_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    meant("qwen")
    assert len(said := capsys.readouterr().err.splitlines()) == 1
    assert "'qwen' is no path" in said[0]
    assert "prompt for the embedded model" in said[0]
    meant("Once upon a time")
    meant("-p", "qwen")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "model", ["org/name", "/nowhere/at/all", "./here", "~/there", "model.gguf", str(demo.MODEL), "org/name/more"]
)
def test_a_model_without_a_prompt_on_a_terminal(model: str) -> None:
    with pytest.raises(ConfigError, match="no prompt"):
        meant(model)


def test_standard_input() -> None:
    for arguments, model in (([], None), (["-"], None), (["org/name"], "org/name"), (["org/name", "-"], "org/name")):
        with piped(b"The king said\r\n"):
            assert meant(*arguments) == (model, "The king said\n")
    with piped(b""):
        assert meant() == (None, demo.PROMPT)  # started by a program, not by a person with a prompt
        with pytest.raises(ConfigError, match="no prompt"):
            meant("org/name")
        with pytest.raises(ConfigError, match="is empty"):
            meant("-")
    with piped(b"Andr\xe9 was"), pytest.raises(ConfigError, match="standard input is not UTF-8"):
        meant("-")


def test_files_are_utf8_with_any_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfOnce\r\nupon")
    assert meant("-f", str(path)) == (None, "Once\nupon")
    for wrong, says in ((b"Andr\xe9 was", "not UTF-8"), ("Once".encode("utf-16"), "not UTF-8"), (b"", "is empty")):
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match=says):
            meant("-f", str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        meant("-f", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "is empty"),
        (["-p", ""], "is empty"),
        (["org/name", "This", "-f", "/dev/null"], "two prompts"),
        (["org/name", "This", "-p", "That"], "two prompts"),
        (["org/name", b"Andr\xe9 was".decode("utf-8", "surrogateescape")], "not UTF-8"),
        ([b"Andr\xe9 was".decode("utf-8", "surrogateescape")], "not UTF-8"),
    ],
)
def test_what_is_no_prompt(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        meant(*arguments)


def test_two_options_are_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        meant("-p", "This", "-f", "/dev/null")
    assert "not allowed with" in capsys.readouterr().err


def test_the_name_of_a_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FATE_HOME", str(tmp_path))
    store = tmp_path / "stores" / "olmoe-int4-0123abcd"
    store.mkdir(parents=True)
    (store / "fate.json").write_text("{}")
    assert meant(store.name, "Hello") == (str(store), "Hello")
    with pytest.raises(ConfigError, match="no prompt"):
        meant(store.name)


def test_a_context_that_does_not_hold_the_answer_is_said_with_both_numbers() -> None:
    assert text._needed(9, 30, 1, None) == text._needed(9, 30, 1, 39) == 39
    assert text._needed(9, 30, 3, None) == 117
    with pytest.raises(ConfigError, match=r"prompt has 9 tokens and the answer up to 30: 39 in all, and context_length is 12"):
        text._needed(9, 30, 1, 12)
    with pytest.raises(ConfigError, match=r"in each of 3 beams: 117 in all, and context_length is 100"):
        text._needed(9, 30, 3, 100)


def test_a_prompt_that_is_far_too_long_is_refused_from_a_sample_of_it() -> None:
    text._refuse_far_too_long("x" * 50_000_000, text._SAMPLE // 4, None)
    text._refuse_far_too_long("x" * 50_000_000, text._SAMPLE // 4, 20_000_000)
    with pytest.raises(ConfigError, match=r"of 50000000 characters is about 12500000 tokens, and the context has 4096"):
        text._refuse_far_too_long("x" * 50_000_000, text._SAMPLE // 4, 4096)


class Conversation:
    """A tokenizer whose template refuses the word "no", and a model of eight tokens that answers with a word."""

    chat_template = "given"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
        if "no" in str(messages[-1]["content"]):
            raise ValueError("roles must alternate")
        return "|".join(str(message["content"]) for message in messages)

    def __call__(self, said: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(said)}

    def get_input_embeddings(self) -> object:
        return argparse.Namespace(weight=torch.zeros(8, 2))


def test_a_turn_that_fails_does_not_end_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Answers:
        def answer(self, ids: list[int], most_tokens: int, on_text: Callable[[str], None], on_read: Any) -> Answer:
            if len(ids) == 4:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nat x")
            on_text("yes\x1b")
            return Answer("yes", (3,), len(ids))

    lines = iter(["one", "no", "four", "/help", "/nope", "/reset", "four", "a" * 40, "/etc/hosts?", "last"])
    monkeypatch.setattr(chat, "_ask", lambda: next(lines, None))
    both = Conversation()
    chat._talk(chat.Talk(both, both, Answers(), 30, 5))  # type: ignore[arg-type]
    said = capsys.readouterr()
    assert said.out == "yes␛\n" * 4
    errors = said.err.splitlines()
    assert [line for line in errors if "roles must alternate" in line]
    assert [line for line in errors if "can't allocate memory at x" in line]
    assert [line for line in errors if "has 40 tokens and the context 30" in line]
    assert [line for line in errors if "there is no command /nope" in line]
    assert len(errors) == 5


def test_a_full_context_is_said_and_the_oldest_turns_go_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Answers:
        def answer(self, ids: list[int], most_tokens: int, on_text: Callable[[str], None], on_read: Any) -> Answer:
            asked.append(len(ids))
            on_read(1, len(ids))
            on_text("yes")
            return Answer("yes", (3,), len(ids))

    lines = iter(["/drop", "a" * 10, "b" * 8, "c" * 9, "/drop", "d" * 2, "/drop"])
    monkeypatch.setattr(chat, "_ask", lambda: next(lines, None))
    chat._talk(chat.Talk(Conversation(), Conversation(), Answers(), 30, 5))  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == [
        "nothing has to be dropped",
        "fate: the conversation has 37 tokens and the context 30; /drop forgets the oldest turn and answers, /reset forgets all",
        "the oldest turn is forgotten",
        "nothing has to be dropped",
    ]
    assert asked == [10, 23, 22, 29]
