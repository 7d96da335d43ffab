"""The verb ``doctor``: what of this machine is used, and why not more."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fate_moe.cli.options import model_name, print_json, print_table, quiet_transformers
from fate_moe.errors import ConfigError
from fate_moe.io.files import is_writable
from fate_moe.switches import cache_home
from fate_moe.units import format_bytes

__all__ = ["add_verbs"]

Facts = list[tuple[str, bool, str]]


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor``."""
    doctor = verbs.add_parser(
        "doctor",
        help="say what is used here",
        description="Whether numbers are right under the settings of this shell, what memory and processors may be used, "
        "which kernels and which GPU are used, and why no better ones; with MODEL, which of its layers run in one step "
        "of our kernels, and every reason why others do not (nothing is loaded)",
    )
    doctor.add_argument("model", nargs="?", type=model_name, metavar="MODEL", help="checkpoint folder, GGUF file, hub id or store")
    doctor.add_argument("--measure", action="store_true", help="measure the link from RAM to the GPU")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(verb=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from fate_moe.gpu.device import gpu_facts
    from fate_moe.kernels.native import kernel_facts

    if arguments.measure:
        _measure(arguments.json)
        return
    if arguments.model is not None:
        _doctor_model(arguments.model, arguments.json)
        return
    kernels, gpus = kernel_facts(), gpu_facts()
    numbers, places = _numbers(), _places()
    if arguments.json:
        named = {"kernels": kernels, "gpus": gpus}
        lists = {key: [{"name": name, "used": used, "why": why} for name, used, why in facts] for key, facts in named.items()}
        print_json({**lists, "numbers": numbers, "places": places})
    else:
        _print_facts(kernels, gpus, numbers, places)
    if numbers["error"]:
        raise ConfigError(numbers["error"])


def _numbers() -> dict[str, Any]:
    """What the self-check finds under the settings as they are, and what loading would make of it."""
    import torch

    from fate_moe.kernels.selfcheck import check_numbers, settings_in_force, wrong_numbers

    wrong, error = wrong_numbers(), None
    try:
        check_numbers()  # warns of what it mends
    except ConfigError as refused:
        error = str(refused)
    return {"wrong": wrong, "error": error, "settings": settings_in_force(), "threads": torch.get_num_threads()}


def _places() -> dict[str, Any]:
    """What this process may use, and where it keeps things."""
    from fate_moe.machine import available_memory, usable_cpus

    home = cache_home()
    return {
        "memory": available_memory(),
        "processors": usable_cpus(),
        "home": str(home),
        "writable": is_writable(home),
    }


def _print_facts(kernels: Facts, gpus: Facts, numbers: dict[str, Any], places: dict[str, Any]) -> None:
    state = "wrong" if numbers["error"] else "mended" if numbers["wrong"] else "right"
    rows = [("numbers", state, "as they should be") if state == "right" else (what, state, "") for what in numbers["wrong"] or [""]]
    rows.append(("settings", "", ", ".join(numbers["settings"]) or "none"))
    rows.append(("threads", str(numbers["threads"]), f"of {places['processors']} processors that may be used"))
    rows.append(("memory", format_bytes(places["memory"]), "may still be used"))
    rows.append(("FATE_HOME", "writable" if places["writable"] else "read-only", places["home"]))
    print_table("This process", rows)
    for title, facts in (("CPU kernels, best first", kernels), ("GPU", gpus)):
        print_table(title, [(name, "used" if used else "-", why) for name, used, why in facts])


def _doctor_model(name: str, as_json: bool) -> None:
    """Which layers of a model are plain, and who runs them."""
    quiet_transformers()
    from fate_moe.adapter.meta_model import build_meta_model
    from fate_moe.checkpoints.gguf import config_folder
    from fate_moe.checkpoints.source import resolve_checkpoint
    from fate_moe.engine.prepare import is_store
    from fate_moe.layers.plain import plain_layers
    from fate_moe.layers.reasons import cuda_reasons

    with config_folder(Path(name) if is_store(name) else resolve_checkpoint(name)) as folder:
        model: Any = build_meta_model(folder)
    layers = plain_layers(model)
    groups, on_gpu = _groups(model, layers), cuda_reasons(model)
    if as_json:
        print_json({"family": model.config.model_type, "layers": groups, "gpu": on_gpu})
        return
    rows = [
        row
        for group in groups
        for row in [
            (_span(group["layers"]), "recognised" if group["plain"] else "not recognised", group["plain"] or ""),
            *(("", "", reason) for reason in group["reasons"]),
            *(("", "CPU", reason) for reason in ([] if not group["plain"] else group["cpu"] or ["runs it in one step"])),
        ]
    ]
    rows += [("all", "GPU", reason) for reason in on_gpu or ["decodes in one step"]]
    print_table(f"{model.config.model_type}: layers with experts, and why they do not run in one step", rows)


def _groups(model: Any, layers: Sequence[Any]) -> list[dict[str, Any]]:
    """Layers of which the same is to say: their ``layers`` by number, what they are (``plain``) or ``reasons``, and ``cpu``'s."""
    from fate_moe.layers.plain import PlainLayer
    from fate_moe.layers.reasons import cpu_reasons

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for layer in layers:
        plain = isinstance(layer, PlainLayer)
        text, reasons = (layer.describe(), ()) if plain else ("", layer.reasons)
        cpu = tuple(cpu_reasons(layer, model.dtype)) if plain else ()
        group = groups.setdefault((text, reasons, cpu), {"layers": [], "plain": text, "reasons": list(reasons), "cpu": list(cpu)})
        group["layers"].append(layer.layer)
    return list(groups.values())


def _span(numbers: Sequence[int]) -> str:
    """As people write ranges: 0-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _measure(as_json: bool) -> None:
    from fate_moe.gpu.device import find_gpu
    from fate_moe.gpu.link import measure_link

    gpu = find_gpu()
    link = measure_link(gpu.name, gpu.device)
    if as_json:
        print_json(asdict(link))
        return
    amounts = [
        ("RAM to GPU, copy engine", link.dma, "pinned memory"),
        ("RAM to GPU, zero-copy", link.zero_copy, "a kernel reads pinned memory: what a captured step does"),
        ("CPU reads", link.memory, f"{link.threads} threads"),
        ("both at once: zero-copy", link.both_zero_copy, ""),
        ("both at once: CPU reads", link.both_memory, ""),
    ]
    rows = [(what, f"{format_bytes(rate)}/s", remark) for what, rate, remark in amounts]
    print_table(gpu.name, rows)
