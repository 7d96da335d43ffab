"""Text in and out: files and standard input as UTF-8, files to write, and what a terminal may be sent. No torch."""

from __future__ import annotations

import codecs
import os
import re
import stat
import sys
from pathlib import Path
from typing import BinaryIO

from fate_moe.errors import ConfigError
from fate_moe.units import format_bytes

__all__ = ["Shown", "argument_text", "check_output", "is_piped", "read_stdin", "read_text"]

MOST_BYTES = 1 << 28  # of a text: more than any of the verbs can use, and /dev/zero has an end
# Longest first: UTF-32's begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, what: str) -> str:
    """The text of a file, "-" being standard input, without a byte order mark and with lines ended by "\\n".

    ``what`` names it in errors. Raises ConfigError for what cannot be read, is no UTF-8 or is longer than MOST_BYTES.
    """
    if str(path) == "-":
        return read_stdin()
    try:
        with path.open("rb") as file:
            return _decoded(file, f"{what} {path}")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{what} {path} cannot be read: {reason}") from error


def read_stdin() -> str:
    """All of standard input, as ``read_text`` reads a file."""
    binary = getattr(sys.stdin, "buffer", None)
    try:
        return sys.stdin.read() if binary is None else _decoded(binary, "standard input")
    except OSError as error:
        raise ConfigError(f"standard input cannot be read: {error.strerror}") from error


def argument_text(text: str) -> str:
    """``text`` of the command line. Raises ConfigError where the shell gave bytes that are no UTF-8."""
    try:
        return text.encode("utf-8").decode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is not UTF-8; convert it, or set the terminal to UTF-8") from error


def is_piped() -> bool:
    """Whether standard input is a pipe or a file, which someone meant as a prompt (and not a terminal or /dev/null)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def check_output(path: Path, *inputs: Path | None) -> None:
    """Raise ConfigError, before anything is computed, where ``path`` cannot become a file: it is a folder or one of ``inputs``, or
    its folder is missing or may not be written to. A file that is there already will be replaced, once the new one is complete."""
    try:
        folder = path.resolve().parent
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file to write")
        if not folder.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {folder}; make it first")
        if any(given is not None and path.exists() and given.exists() and path.samefile(given) for given in inputs):
            raise ConfigError(f"{path} is what is read; name another file to write")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file; name a file to write")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be written: {reason}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be written: no right to write in {folder}; name another folder")


class Shown:
    """Text as it may be shown on a terminal: a control character, with which a model could move the cursor or rename the window,
    becomes its visible sign. Line ends and tabs stay. Pieces of one text are given one after another."""

    _CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

    def __init__(self) -> None:
        self._held = ""  # a carriage return, of which the next piece says whether it ends a line

    def __call__(self, text: str) -> str:
        text = self._held + text
        self._held = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r").replace("\r\n", "\n")
        return self._CONTROLS.sub(_sign, text)


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _decoded(file: BinaryIO, what: str) -> str:
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{what} has more than {format_bytes(MOST_BYTES)}; give a shorter text")
    for mark, name in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise ConfigError(f"{what} is {name}, not UTF-8; convert it: iconv -f {name} -t UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 (byte {error.start}); convert it, for example with iconv -t UTF-8") from error
    if "\0" in text:
        raise ConfigError(f"{what} has a zero byte (at character {text.index(chr(0))}): it is no text, or UTF-16 to be converted")
    return text.replace("\r\n", "\n").replace("\r", "\n")
