"""The command ``fate``: parses, then calls one function a verb. Imports torch only inside the verbs, so that help is instant.

Each module beside this one has a group of verbs and an ``add_verbs``; GROUPS says in which order help lists them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback

from fate_moe import __version__, switches
from fate_moe.cli import doctor, families, listing, quality, serve, stores, text, traces
from fate_moe.cli.options import add_verbosity
from fate_moe.errors import FateError

__all__ = ["build_parser", "main"]

GROUPS = (text, serve, stores, listing, families, quality, traces, doctor)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 fine, 1 an error in one line, 130 interrupted)."""
    _open_closed_streams()
    verbose = 0
    try:
        arguments = build_parser().parse_args(argv)
        verbose = getattr(arguments, "verbose", 0)
        switches.check()
        _start_logging(verbose)
        arguments.verb(arguments)
        sys.stdout.flush()  # here, where a closed pipe is met quietly
    except FateError as error:
        return _failed(error, str(error), verbose)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `fate run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written to: the system's words say which
        return _failed(error, f"{error.filename or 'the system'}: {error.strerror or error}", verbose)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the reference in the docs is made from it."""
    parser = argparse.ArgumentParser(
        prog="fate", description="Runs Mixture-of-Experts language models that are bigger than memory."
    )
    parser.add_argument("--version", action="version", version=f"fate {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for group in GROUPS:
        group.add_verbs(verbs)
    add_verbosity(parser)
    return parser


def _failed(error: Exception, message: str, verbose: int) -> int:
    if verbose > 1:
        traceback.print_exception(error)
    print(f"fate: {message}", file=sys.stderr)
    return 1


def _start_logging(verbose: int) -> None:
    """Our messages on stderr from the level of -v or FATE_LOG on, other libraries' from warnings on."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    level = switches.log_level()
    if verbose:
        level = logging.INFO if verbose == 1 else logging.DEBUG
    log = logging.getLogger("fate_moe")
    log.setLevel(level)
    for sentence in switches.misspelt():
        log.warning("%s", sentence)


def _open_closed_streams() -> None:
    """Give stdin, stdout and stderr something to stand for where the caller closed them: print() would write to the other one, and
    the next file to be opened would take their place. Text that has no UTF-8 is printed with replacements."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115  # stays open
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
