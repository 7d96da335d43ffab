"""Texts that verbs read, and what a terminal is sent."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from fate_moe.cli import reading
from fate_moe.cli.reading import Shown, check_output, read_text
from fate_moe.cli.traces import _texts
from fate_moe.errors import ConfigError
from fate_moe.trace.plots import draw


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfOnce\r\nupon\ra\n", "Once\nupon\na\n"),
        ("שלום 你好 😀 é".encode(), "שלום 你好 😀 é"),
        (b"", ""),
    ],
)
def test_texts_are_utf8_with_any_mark_and_line_ends(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(data)
    assert read_text(tmp_path / "t", "the text") == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("Once".encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv -f UTF-16"),
        ("Once".encode("utf-32"), "is UTF-32, not UTF-8"),
        ("Once".encode("utf-16-le"), "has a zero byte"),
        (b"Once\0upon", r"has a zero byte \(at character 4\)"),
        (b"Andr\xe9 was", r"is not UTF-8 \(byte 4\)"),
        (b"\xed\xb3\xbf", "is not UTF-8"),  # a lone surrogate, as some programs write it
    ],
)
def test_what_is_no_text_is_named(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        read_text(tmp_path / "t", "the text")


def test_files_without_an_end_and_without_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 1 << 16)
    for path, says in (
        (Path("/dev/zero"), "has more than 64 KiB"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("a" * 300), "File name too long"),
        (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_text(path, "the text")


def test_pipes_and_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"through a pipe")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}"), "the text") == "through a pipe"
    os.close(reader)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbffrom - \r\n")))
    assert read_text(Path("-"), "the text") == "from - \n"


def test_prompts_of_traces(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "line\\u2028separator"}\n\n{"question": "two"}\n')
    assert _texts(path) == ["line\u2028separator", "two"]
    for wrong, says in (
        ('{"prompt": 5}', "line 1: the prompt is no text"),
        ("[1]", "line 1"),
        ("[" * 100000, "line 1"),
        ("\n", "no text in it"),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=says):
            _texts(path)


def test_outputs_are_checked_before_anything_is_computed(tmp_path: Path) -> None:
    there, link, fifo = tmp_path / "there", tmp_path / "link", tmp_path / "fifo"
    there.write_text("x")
    link.symlink_to(there)
    os.mkfifo(fifo)
    check_output(there)
    check_output(tmp_path / "new", there, None)
    for path, inputs, says in (
        (link, (there,), "is what is read"),
        (fifo, (), "is no regular file"),
        (tmp_path, (), "is a folder"),
        (there / "below", (), "there is no folder"),
        (tmp_path / ("a" * 300), (), "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_output(path, *inputs)


def test_what_a_link_points_to_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """A link stays one (/dev/stdout is one too), and an error while drawing leaves the old picture and nothing beside it."""
    rows = [{"policy": "lru", "predictor": "none", "capacity": 0.5, "ready_on_time": 0.5}]
    results, there, link = tmp_path / "rows.json", tmp_path / "there.png", tmp_path / "link.png"
    results.write_text(json.dumps({"rows": rows}))
    there.write_text("old")
    link.symlink_to(there)
    broken: object
    for broken in ([{}], 5, None):
        (tmp_path / "broken.json").write_text(json.dumps({"rows": broken}))
        with pytest.raises(ConfigError, match="holds no rows"):
            draw(tmp_path / "broken.json", link)
    assert there.read_text() == "old"
    draw(results, link)
    assert link.is_symlink()
    assert there.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "link.png", "rows.json", "there.png"]


def test_a_model_cannot_send_escape_sequences_to_a_terminal() -> None:
    shown = Shown()
    pieces = ["\x1b", "[2J\x9b31m", "red\x07\b\x7f\0", "a\r", "\nb\r", "c\td"]
    assert "".join(map(shown, pieces)) == "␛[2J�31mred␇␈␡␀a\nb␍c\td"
    assert Shown()("שלום 你好 😀 e\u0301 \u200d") == "שלום 你好 😀 e\u0301 \u200d"
