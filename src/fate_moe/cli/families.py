"""The verb about what can be run: models."""

from __future__ import annotations

import argparse
from typing import Any

from fate_moe.cli.options import print_json, print_table, quiet_transformers

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    models = verbs.add_parser(
        "models",
        help="list the families that run",
        description="List every Mixture-of-Experts family of the installed transformers, and whether it runs.",
    )
    models.add_argument("--json", action="store_true", help="print one JSON object with one entry for each family")
    models.set_defaults(verb=_models)


def _models(arguments: argparse.Namespace) -> None:
    quiet_transformers()
    from fate_moe.adapter.families import moe_families
    from fate_moe.adapter.table import known_families, tried_with

    rows = known_families(moe_families())
    if arguments.json:
        print_json({"families": [row.as_dict() for row in rows]})
        return
    good = sum(row.status == "ok" for row in rows)
    whole = sum(row.layers == "recognised" for row in rows)
    print_table(
        f"{good} of {len(rows)} families run, {whole} with layers that the CPU's kernels run whole (transformers {tried_with()})",
        [(row.family, row.status, row.in_short()) for row in rows],
    )
