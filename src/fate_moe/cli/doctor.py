"""The verb ``doctor``: what of this machine is used, and why not more."""

from __future__ import annotations

import argparse
import json

from fate_moe.cli.options import print_table

__all__ = ["add_verbs"]


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor``."""
    doctor = verbs.add_parser("doctor", help="say what is used here", description="Which kernels are used, and why no better ones")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(verb=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from fate_moe.kernels.native import kernel_facts

    facts = kernel_facts()
    if arguments.json:
        print(json.dumps({"kernels": [{"name": name, "used": used, "why": why} for name, used, why in facts]}))
    else:
        print_table("CPU kernels, best first", [(name, "used" if used else "-", why) for name, used, why in facts])
