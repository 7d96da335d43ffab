"""The verb ``doctor``: what of this machine is used, and why not more."""

from __future__ import annotations

import argparse
import json

from fate_moe.cli.options import print_table
from fate_moe.units import format_bytes

__all__ = ["add_verbs"]


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor``."""
    doctor = verbs.add_parser(
        "doctor", help="say what is used here", description="Which kernels and which GPU are used, and why no better ones"
    )
    doctor.add_argument("--calibrate", action="store_true", help="measure the way from RAM to the GPU, and keep the result")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(verb=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from fate_moe.gpu.device import gpu_facts
    from fate_moe.kernels.native import kernel_facts

    if arguments.calibrate:
        _calibrate(arguments.json)
        return
    kernels, gpus = kernel_facts(), gpu_facts()
    if arguments.json:
        named = {"kernels": kernels, "gpus": gpus}
        print(
            json.dumps(
                {key: [{"name": name, "used": used, "why": why} for name, used, why in facts] for key, facts in named.items()}
            )
        )
        return
    for title, facts in (("CPU kernels, best first", kernels), ("GPU", gpus)):
        print_table(title, [(name, "used" if used else "-", why) for name, used, why in facts])


def _calibrate(as_json: bool) -> None:
    from fate_moe.gpu.device import find_gpu
    from fate_moe.gpu.link import measure_link, save_link

    gpu = find_gpu()
    link = measure_link(gpu.name, gpu.device)
    path = save_link(link)
    if as_json:
        print(json.dumps({**link.as_dict(), "path": path}))
        return
    decision = (
        f"the CPU may compute {link.cpu_fraction:.0%} of the misses"
        if link.cpu_fraction
        else "the link is fast enough: the CPU computes no misses"
    )
    amounts = [
        ("RAM to GPU, copy engine", link.dma, "pinned memory"),
        ("RAM to GPU, zero-copy", link.zero_copy, "a kernel reads pinned memory: what a captured step does"),
        ("CPU reads", link.memory, f"{link.threads} threads"),
        ("both at once: zero-copy", link.both_zero_copy, ""),
        ("both at once: CPU reads", link.both_memory, ""),
    ]
    rows = [(what, f"{format_bytes(rate)}/s", remark) for what, rate, remark in amounts]
    print_table(f"{gpu.name}, kept in {path}", [*rows, ("both against zero-copy alone", f"{link.gain:.2f}x", decision)])
