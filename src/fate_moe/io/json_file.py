"""Reads JSON files that people edit: any Unicode encoding with or without a byte order mark, and errors that say what to change."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from fate_moe.errors import CheckpointError
from fate_moe.io.bounded import read_bounded

__all__ = ["parse_json", "read_json", "unmarked_json", "what_it_is"]

# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_json(path: Path) -> Any:
    """The content of a checkpoint's JSON file. Raises CheckpointError with the file, the line and what to do.

    FileNotFoundError passes: the caller knows what a missing file means.
    """
    try:
        return parse_json(read_bounded(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error


def parse_json(data: bytes, unique: bool = True) -> Any:
    """The value of the JSON text ``data``. Raises ValueError, worded to follow the file's name, with the line and what to do.

    ``unique``: a key that has two different values is an error too.
    """
    if reason := what_it_is(data):
        raise ValueError(reason)
    text = _decoded(data)
    if not text.strip():
        raise ValueError("is empty; fetch it again")
    try:
        return json.loads(text, object_pairs_hook=_object if unique else None)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: line {error.lineno}, column {error.colno}: {_advice(text, error)}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply; fetch it again") from error


def unmarked_json(data: bytes) -> bytes:
    """``data`` in UTF-8 if it begins with a byte order mark, which most readers refuse; otherwise unchanged."""
    if not any(data.startswith(mark) for mark, _ in _MARKS):
        return data
    try:
        return _decoded(data).encode()
    except ValueError:
        return data  # whoever reads it says what is wrong


def what_it_is(data: bytes) -> str | None:
    """What ``data`` is instead of the file, and the remedy, if it begins as a Git LFS pointer or a web page does; else None."""
    begin = data[:64].lstrip().lower()
    if begin.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer instead of the file; run git lfs pull in its folder"
    if begin.startswith((b"<!doctype html", b"<html")):
        return "is a web page instead of the file; download it again, as a raw file"
    return None


def _decoded(data: bytes) -> str:
    """Without a byte order mark. Raises ValueError, with the line, where it is not Unicode."""
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start + len(mark)) + 1
        byte = error.object[error.start]
        raise ValueError(f"is not {encoding.upper()} text (byte 0x{byte:02x} in line {line}); save it as UTF-8") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made and made[key] != value:
            raise ValueError(f"has {key!r} twice, as {made[key]!r} and as {value!r}"[:200] + "; delete one of them")
        made[key] = value
    return made


def _advice(text: str, error: json.JSONDecodeError) -> str:
    before, at = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if at.startswith(("//", "/*", "#")):
        return "JSON has no comments; delete it"
    if before.endswith(",") and at.startswith(("}", "]")):
        return "a comma before a closing bracket; delete the comma"
    if at.startswith("'"):
        return "JSON writes strings in double quotes"
    if at.startswith(("True", "False", "None")):
        return "JSON writes true, false and null"
    if not at:
        return "the file ends too early; fetch it again"
    return f"{error.msg[:1].lower()}{error.msg[1:]}; correct this line, or fetch the file again"
