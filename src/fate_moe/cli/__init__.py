"""The command ``fate``: parses, then calls one function a verb. Imports torch only inside the verbs, so that help is instant.

Each module beside this one has a group of verbs and an ``add_verbs``; GROUPS says in which order help lists them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from fate_moe import __version__
from fate_moe.cli import doctor, families, quality, stores, text, traces
from fate_moe.errors import FateError

__all__ = ["main"]

GROUPS = (text, stores, families, quality, traces, doctor)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 fine, 1 an error of ours in one line, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        arguments.verb(arguments)
    except FateError as error:
        print(f"fate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `fate run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fate", description="Runs Mixture-of-Experts language models that are bigger than memory."
    )
    parser.add_argument("--version", action="version", version=f"fate {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for group in GROUPS:
        group.add_verbs(verbs)
    return parser
