"""argparse with errors of one line that name the nearest word, and the numbers that options take."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fate_moe.cli.net import one_line, say
from fate_moe.errors import ConfigError
from fate_moe.units import Range

__all__ = ["Number", "Parser", "count", "file_path", "number", "size"]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say ``message``, with what was probably meant, and exit with 2."""
        say(f"{self.prog}: {one_line(message)}{self._hint(message)}; see {self.prog} --help")
        raise SystemExit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; words that nobody takes are an error of the verb that they were given to."""
        words = sys.argv[1:] if args is None else args
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            self._verb_of(words).error(f"unrecognized arguments: {' '.join(rest)}")
        return found

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """As argparse's; errors of ours name the option."""
        try:
            return super()._get_value(action, arg_string)
        except ConfigError as error:
            raise ConfigError(f"{action.option_strings[-1] if action.option_strings else action.dest}: {error}") from error

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As argparse's, which takes the value of --option=-- for the word that ends options, and gives an empty list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def _verb_of(self, words: Sequence[str]) -> Parser:
        """The parser of the verb in ``words``."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for at, word in enumerate(words):
                    if isinstance(verb := action.choices.get(word), Parser):
                        return verb._verb_of(words[at + 1 :])
        return self

    def _hint(self, message: str) -> str:
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message, re.DOTALL):
            return _nearest(found[1], re.findall(r"[\w.-]+", found[2]))
        if found := re.match(r"unrecognized arguments: (-\S*)", message):
            options = [option for action in self._actions for option in action.option_strings]
            hint = _nearest(found[1].partition("=")[0], options) if found[1].startswith("--") else ""
            takes_text = any(action.dest == "prompt" for action in self._actions)
            return hint or ("; a prompt that begins with - is given as -p=TEXT" if takes_text else "")
        if found := re.match(r"argument \S*?(-[\w-]+): expected one argument", message):
            return f"; a value that begins with - is given as {found[1]}=VALUE"
        return ""


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class Number:
    """The type of an option that takes a number of ``range``: refuses every other text while the command line is read.

    What is no number at all is an error of usage, as argparse has them; a number out of the range is a ConfigError.
    """

    def __init__(self, allowed: Range) -> None:
        self.range = allowed

    def __call__(self, text: str) -> int | float:
        try:
            return self.range.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error


def count(low: int = 1, high: int = (1 << 31) - 1) -> Number:
    """A whole number from ``low`` to ``high``."""
    return Number(Range(low, high, whole=True))


def number(low: float, high: float = 1e9, *, above: bool = False) -> Number:
    """A finite number from ``low`` to ``high``; ``above``: more than ``low``."""
    return Number(Range(low, high, above=above))


def file_path(text: str) -> Path:
    """The type of an option that takes a path: an empty one, which Path takes for the current folder, is a variable that was not
    set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def size(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """The type of an option that takes text which ``parse`` understands; the text itself is the value.

    ``parse`` raises ConfigError for any other.
    """

    def checked(text: str) -> str:
        parse(text)
        return text

    return checked
