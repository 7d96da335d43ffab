"""Reference pages from the code: a hook of mkdocs that fills ``<!-- generate: NAME -->`` with Markdown, NAME being a key of PARTS.

No torch is imported: the parsers, the options' dataclass, the errors and the switches import none.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from typing import Any

import fate_moe
from fate_moe import cli, errors
from fate_moe.config import OffloadConfig

MARKER = re.compile(r"<!-- generate: ([a-z]+) -->")
# Groups of options that many verbs have: described once, at the end of the page.
SHARED = ("memory and experts", "sampling")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event: the page's source with every marker replaced. Raises KeyError for a name that is not in PARTS."""
    return MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; pipes and line breaks in cells are escaped."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in rows)]
    return "".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def fate_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    build: Callable[[], argparse.ArgumentParser] = getattr(cli, "build_parser", None) or cli._parser
    return build()


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser's verbs by what is typed, verbs of verbs ("fate eval compare") included."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found[child.prog] = child
                found |= verbs(child)
    return found


def command_line() -> str:
    """Every verb: what it does, its arguments, its options; then the groups that verbs share, from the verb with most of each."""
    parts, shared = [], dict[str, list[argparse.Action]]()
    for name, parser in verbs(fate_parser()).items():
        parts.append(f"## {name}\n\n{_plain(parser.description or '')}\n\n```text\n{_usage(name, parser)}\n```\n")
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if not isinstance(action, _HIDDEN)]
            title = next((title for title in SHARED if (group.title or "").startswith(title)), None)
            if title is None and actions:
                parts.append(table(("argument" if not actions[0].option_strings else "option", "meaning"), map(_row, actions)))
            elif title is not None:
                named = ", ".join(f"`{action.option_strings[0]}`" for action in actions)
                parts.append(f"Options of [{title}](#{_anchor(title)}): {named}.\n")
                shared[title] = max(shared.get(title, []), actions, key=len)
    for title, actions in shared.items():
        parts.append(f"## {title.capitalize()} {{ #{_anchor(title)} }}\n\n" + table(("option", "meaning"), map(_row, actions)))
    return "\n".join(parts)


_HIDDEN = (argparse._HelpAction, argparse._VersionAction, argparse._SubParsersAction)


def _anchor(title: str) -> str:
    return "options-" + title.replace(" ", "-")


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    """One line: the positional arguments, and that there are options."""
    options = any(action.option_strings and not isinstance(action, _HIDDEN) for action in parser._actions)
    words = [name, *(["[OPTIONS]"] if options else [])]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words.append(str(action.metavar or "VERB"))
        elif not action.option_strings:
            said = str(action.metavar or action.dest).upper()
            words.append(f"[{said}]" if action.nargs in ("?", "*", argparse.REMAINDER) else said)
    return " ".join(words)


def _row(action: argparse.Action) -> tuple[str, str]:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{str(action.metavar or action.dest).upper()}`"
    value = ""
    if action.option_strings and action.nargs != 0:
        value = (
            " `" + (" | ".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest).upper()) + "`"
        )
    help_text = (action.help or "") % {**vars(action), "prog": "fate"}
    return names + value.replace(" | ", "`, `"), _plain(help_text)


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*")


def options() -> str:
    """The fields of OffloadConfig with their defaults, described by its docstring."""
    document = inspect.getdoc(OffloadConfig) or ""
    names = [field.name for field in fields(OffloadConfig)]
    matches = re.finditer(r"(?:^|[;.] )(\w+): ", document, re.MULTILINE)
    begins = [(found.start(1), found[1]) for found in matches if found[1] in names]
    said = {}
    for (start, name), (end, _) in zip(begins, [*begins[1:], (len(document), "")], strict=True):
        said[name] = document[start + len(name) + 2 : end].split("\n\n")[0].strip().rstrip(";")
    verb = verbs(fate_parser())["fate serve"]
    typed = {action.dest: action.option_strings[-1] for action in verb._actions if action.option_strings}
    rows = (
        (f"`{field.name}`", f"`{typed[field.name]}`" if field.name in typed else "", f"`{field.default!r}`", said[field.name])
        for field in fields(OffloadConfig)
    )
    return table(("field", "command line", "default", "meaning"), rows)


def error_tree() -> str:
    """The tree of errors as errors.py draws it, then each with its docstring."""
    document = inspect.getdoc(errors) or ""
    tree = document[document.index("FateError\n") :]
    parts = [f"```text\n{tree}\n```\n"]
    for name in errors.__all__:
        error = getattr(errors, name)
        parts.append(f"## {name}\n\n{inspect.getdoc(error)}\n\nIs a `{error.__base__.__name__}`.\n")
    return "\n".join(parts)


def environment() -> str:
    """The table in the docstring of ``fate_moe.switches``, which names every variable that the package reads."""
    if not importlib.util.find_spec("fate_moe.switches"):
        return "This version lists no environment variables.\n"
    head, *rows = simple_table(inspect.getdoc(importlib.import_module("fate_moe.switches")) or "")
    return table(head, ((f"`{name}`", *map(_plain, rest)) for name, *rest in rows))


def simple_table(text: str) -> list[list[str]]:
    """The rows of the first reStructuredText "simple table" in ``text``, its head first. Raises ValueError if there is none."""
    lines = text.splitlines()
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"=+( +=+)+", line)]
    if len(rules) < 3:
        raise ValueError("no table between lines of = signs")
    starts = [found.start() for found in re.finditer("=+", lines[rules[0]])]
    bounds = list(zip(starts, [*starts[1:], None], strict=True))
    rows: list[list[str]] = []
    for line in lines[rules[0] + 1 : rules[1]] + lines[rules[1] + 1 : rules[2]]:
        cells = [line[start:end].strip() for start, end in bounds]
        if cells[0]:
            rows.append(cells)
        else:  # a line that goes on
            rows[-1] = [f"{before} {more}".strip() for before, more in zip(rows[-1], cells, strict=True)]
    return rows


def choices(option: str, registry: str) -> str:
    """The values of an option of ``fate run``, with what ``fate_moe.registry`` says of them (``registry`` names its table)."""
    entries: dict[str, Any] = {}
    if importlib.util.find_spec("fate_moe.registry"):
        entries = dict(getattr(importlib.import_module("fate_moe.registry"), registry, {}))
    (action,) = (action for action in verbs(fate_parser())["fate run"]._actions if option in action.option_strings)
    rows = []
    for name in action.choices or ():
        entry = entries.get(name)
        pair = [f"`{entry.policy}`", f"`{entry.predictor}`"] if registry == "PRESETS" and entry else []
        rows.append([f"`{name}`", *pair, _plain(getattr(entry, "summary", "") or SAID.get(name, ""))])
    pair = ["policy", "predictor"] if rows and len(rows[0]) == 4 else []
    return table([option.lstrip("-"), *pair, "what it does"], rows)


# Choices that the registry does not describe.
SAID = {
    "full": "everything is read: the only one that keeps every number",
    "prefill-popularity": "a prompt's least popular experts are read as a shorter view",
    "routing-weighted": "in decode, experts with a small routing weight are read as a shorter view",
    "budget": "as many bits as can be read while a layer computes",
}


def python_names() -> str:
    """A directive of mkdocstrings for each public name of ``fate_moe`` that is no error (they have a page of their own)."""
    names = [name for name in fate_moe.__all__ if name not in errors.__all__ and not name.startswith("__")]
    return "\n".join(f"::: fate_moe.{name}\n" for name in names)


PARTS: dict[str, Callable[[], str]] = {
    "commands": command_line,
    "environment": environment,
    "errors": error_tree,
    "options": options,
    "policies": partial(choices, "--policy", "POLICIES"),
    "precisionpolicies": partial(choices, "--precision-policy", "PRECISION_POLICIES"),
    "predictors": partial(choices, "--predictor", "PREDICTORS"),
    "presets": partial(choices, "--preset", "PRESETS"),
    "python": python_names,
}
