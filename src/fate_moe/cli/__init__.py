"""The command ``fate``: parses, then calls one function a verb. Imports torch only inside the verbs, so that help is instant.

Each module beside this one has a group of verbs and an ``add_verbs``; ``build_parser`` says in which order help lists them. Imports
are inside the functions here, so that the net is there before anything that takes time is imported.
"""

from __future__ import annotations

import argparse
import logging
import sys

from fate_moe.cli.net import Net, open_closed_streams, say

__all__ = ["build_parser", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 fine, 1 an error in one line, 130 interrupted, 141 nobody reads the output).

    Raises SystemExit as argparse does: 0 after --help, 2 for a command line that cannot be read; and above 128 after a signal.
    """
    open_closed_streams(as_command=argv is None)
    with Net(as_command=argv is None) as net:
        from fate_moe import switches
        from fate_moe.cli.options import check_options

        parser, words = build_parser(), sys.argv[1:] if argv is None else argv
        if not words:
            parser.print_help(sys.stderr)
            return 2
        arguments = parser.parse_args([*words[1:], "--help"] if words[0] == "help" else words)
        switches.check()
        verbose = getattr(arguments, "verbose", 0)
        net.start(verbose, {0: switches.log_level(), 1: logging.INFO}.get(verbose, logging.DEBUG))
        for sentence in switches.misspelt():
            say(sentence)
        check_options(arguments)
        arguments.verb(arguments)
    return net.code


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the reference in the docs is made from it."""
    from fate_moe import __version__
    from fate_moe.cli import chat, doctor, families, listing, quality, serve, stores, text, traces
    from fate_moe.cli.options import add_verbosity
    from fate_moe.cli.parser import Parser

    parser = Parser(
        prog="fate",
        description="Runs Mixture-of-Experts language models that are bigger than memory.",
        epilog="fate help VERB, or fate VERB --help, describes a verb.",
    )
    parser.add_argument("--version", action="version", version=f"fate {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for group in (text, chat, serve, stores, listing, families, quality, traces, doctor):
        group.add_verbs(verbs)
    add_verbosity(parser)
    return parser
