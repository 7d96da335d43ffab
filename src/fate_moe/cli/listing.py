"""Verbs about the stores that there are: list, rm."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fate_moe.cli.net import one_line
from fate_moe.cli.options import draw_table, print_json
from fate_moe.errors import ConfigError, StoreError
from fate_moe.store.home import check_removable, find_store, remove_store, stored_models, stores_home
from fate_moe.switches import cache_home
from fate_moe.units import format_bytes

__all__ = ["add_verbs", "ago"]


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    listing = verbs.add_parser(
        "list", help="show the stores", description="Show the stores under $FATE_HOME, which a first `fate run MODEL` made."
    )
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    listing.set_defaults(verb=_list)

    remove = verbs.add_parser(
        "rm", help="remove stores", description="Delete stores or unfinished conversions; the checkpoints they came from stay."
    )
    remove.add_argument("stores", nargs="+", metavar="STORE", help="a name as `fate list` shows it, or the folder of a store")
    remove.add_argument("-y", "--yes", action="store_true", help="do not ask; also needed outside $FATE_HOME")
    remove.set_defaults(verb=_remove)


def _list(arguments: argparse.Namespace) -> None:
    found = stored_models()
    if arguments.json:
        print_json({"home": str(stores_home()), "stores": [store.as_dict() for store in found]})
        return
    if not found:
        print(f"no stores in {stores_home()}")
        return
    from rich.table import Table

    table = Table()
    for name in ("name", "source", "precision", "size", "last used"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for store in found:
        what = store.precision if store.state == "whole" else store.state
        table.add_row(store.name, store.source or "-", what, format_bytes(store.num_bytes), ago(store.last_used))
    draw_table(table)
    print(f"{format_bytes(sum(store.num_bytes for store in found))} in {stores_home()}")


def ago(last_used: float | None) -> str:
    """ "3 hours ago", from a Unix time in seconds."""
    if last_used is None:
        return "never"
    seconds = time.time() - last_used
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"


def _remove(arguments: argparse.Namespace) -> None:
    paths = [_path_of(text) for text in arguments.stores]
    home = cache_home().resolve()
    for path in paths:
        check_removable(path)
        if not path.resolve().is_relative_to(home) and not arguments.yes:
            raise ConfigError(f"{path} is outside {home}; give -y to remove it all the same")
    if not arguments.yes and not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on; give -y to remove without asking")
    for path in paths:
        if arguments.yes or _confirmed(path):
            print(f"removed {path}: {format_bytes(remove_store(path))}")


def _path_of(text: str) -> Path:
    """The folder that ``text`` means. Raises StoreError if there is none."""
    path = find_store(text) or Path(text)
    if not path.is_dir():
        raise StoreError(f"there is no store {text}; fate list shows those under {stores_home()}")
    return path if path.is_symlink() else path.resolve()


def _confirmed(path: Path) -> bool:
    with suppress(OSError):
        print(f"remove {one_line(str(path))}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
