"""What verbs share: groups of options, what they become, tables and JSON."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fate_moe import demo
from fate_moe.adapter.sampling import GREEDY_BELOW, RANGES
from fate_moe.cli.net import one_line
from fate_moe.cli.parser import Number, count
from fate_moe.config import COUNTS, DEVICES, PRECISION_POLICIES, OffloadConfig
from fate_moe.core import KV_FORMATS, PRECISIONS
from fate_moe.errors import ConfigError
from fate_moe.registry import POLICIES, PREDICTORS, PRESETS, Entry, Preset
from fate_moe.store.home import find_store

__all__ = [
    "DEFAULTS",
    "JSON_SCHEMA",
    "MODEL_HELP",
    "add_model",
    "add_offload_options",
    "add_sampling_options",
    "add_verbosity",
    "check_options",
    "draw_table",
    "generate_options",
    "model_name",
    "offload_config",
    "print_json",
    "print_table",
    "quiet_transformers",
    "require_gpu",
    "store_of",
    "with_demo_chat",
]

MODEL_HELP = (
    "checkpoint folder, GGUF file, hub id, or store (a folder, or a name as fate list shows it); "
    f"{demo.CHAT}: a small model that talks, built on first use"
)
# The version of all JSON that verbs print: a change that breaks readers raises it, a new key does not.
JSON_SCHEMA = 1
DEFAULTS = {field.name: field.default for field in fields(OffloadConfig)}
# Blocks of a few hundred thousand tokens of a small model, of some ten thousand of one with 30 billion parameters.
PREFIX_DISK = "4GiB"
# Options of generate(), by their names in transformers; those of _SAMPLES mean nothing without sampling.
_SAMPLING = {
    "temperature": "higher is more surprising; 0 takes the likeliest token",
    "top_k": "sample among the k likeliest tokens; 0: among all",
    "top_p": "sample among the likeliest tokens that together have this probability",
    "min_p": "drop tokens below this fraction of the likeliest one's probability",
    "repetition_penalty": "above 1.0 discourages repeating",
    "num_beams": "beam search: so many continuations are followed, each with KV cache of its own, and the text comes at the end",
}
_SAMPLES = ("temperature", "top_k", "top_p", "min_p")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model of a verb; what is given becomes a store with ``store_of`` or ``with_demo_chat``."""
    parser.add_argument("model", nargs="?", type=model_name, help=f"{MODEL_HELP}; none: the embedded model")


def add_offload_options(parser: argparse.ArgumentParser, gpu: bool = False, prefixes: bool = False) -> None:
    """One option for every field of OffloadConfig; those of a GPU and of prefixes for verbs that can use them."""
    group = parser.add_argument_group("memory and experts")
    if gpu:
        group.add_argument(
            "--vram",
            metavar="SIZE|FRACTION|auto",
            help="compute on the GPU with so much of its memory; experts beyond it stay in RAM",
        )
        group.add_argument("--device", choices=DEVICES, help="cuda: the same as --vram auto")
        group.add_argument(
            "--host-compute",
            default=DEFAULTS["host_compute"],
            metavar="auto|FRACTION|off",
            help="of the experts missing in VRAM, how many the CPU computes instead of copying them (auto: as many as a "
            "measurement while loading says, none of lossless experts, whose numbers that would change); default: %(default)s",
        )
        group.add_argument(
            "--no-cuda-graph",
            dest="cuda_graph",
            action="store_false",
            help="launch the GPU's kernels one by one: same tokens, slower",
        )
    group.add_argument(
        "--ram", default=DEFAULTS["ram"], metavar="SIZE|FRACTION|auto", help="for the whole process; default: %(default)s"
    )
    group.add_argument("--expert-cache", metavar="SIZE|PERCENT", help="for expert slots; default: what the budget leaves")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULTS["preset"],
        metavar="NAME",
        help=f"which experts stay and which are read ahead; default: %(default)s. {_summaries(PRESETS)}",
    )
    in_ram = "; on a GPU, in RAM where experts come from the disk" if gpu else ""
    not_there = "; not on a GPU" if gpu else ""
    group.add_argument(
        "--policy",
        choices=POLICIES,
        metavar="NAME",
        help=f"which expert gives up its slot{in_ram}; default: the preset's. {_summaries(POLICIES)}",
    )
    group.add_argument(
        "--predictor",
        choices=PREDICTORS,
        metavar="NAME",
        help=f"which experts are read ahead{not_there}; default: the preset's. {_summaries(PREDICTORS)}",
    )
    group.add_argument(
        "--look-ahead",
        type=Number(COUNTS["look_ahead"]),
        default=DEFAULTS["look_ahead"],
        metavar="K",
        help=f"layers predicted ahead{not_there}; default: %(default)s",
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default=DEFAULTS["precision"], help="of the experts; default: %(default)s"
    )
    group.add_argument(
        "--dense-precision", choices=PRECISIONS, help="of all other matrices; default: int8 beside quantized experts"
    )
    group.add_argument(
        "--precision-policy",
        choices=PRECISION_POLICIES,
        default=DEFAULTS["precision_policy"],
        help="bits read of a missing expert; default: %(default)s, the only one that keeps every number",
    )
    group.add_argument(
        "--context-length",
        type=Number(COUNTS["context_length"]),
        metavar="N",
        help="tokens to set KV cache aside for; run: as many as it needs",
    )
    if prefixes:
        add_prefix_options(group)
    group.add_argument(
        "--kv-cache",
        choices=KV_FORMATS,
        default=DEFAULTS["kv_cache"],
        help=f"how the KV cache holds numbers{not_there}; int8 takes about half; default: %(default)s",
    )
    group.add_argument(
        "--io-threads",
        type=Number(COUNTS["io_threads"]),
        default=DEFAULTS["io_threads"],
        metavar="N",
        help="reads at once; default: %(default)s",
    )
    on_cpu = "; on a GPU, only with --host-compute" if gpu else ""
    group.add_argument(
        "--exact-activations",
        action="store_true",
        help=f"multiply quantized weights with fp32 activations, not int8 ones{on_cpu}",
    )


def add_prefix_options(group: Any) -> None:
    """What is kept of texts that ended."""
    group.add_argument(
        "--prefix-cache",
        default=DEFAULTS["prefix_cache"],
        metavar="SIZE|PERCENT|off",
        help="how much of the KV cache may keep what ended, so that a text which begins alike is not read again; not on a GPU; "
        "default: %(default)s",
    )
    group.add_argument(
        "--prefix-cache-disk",
        default=PREFIX_DISK,
        metavar="SIZE|off",
        help="how much of the disk may keep it, under $FATE_HOME/kv, for later runs; default: %(default)s",
    )


def _summaries(entries: Mapping[str, Entry | Preset]) -> str:
    """One sentence that says what each name stands for."""
    return "; ".join(f"{name}: {of.summary}" if of.summary else name for name, of in sorted(entries.items())).replace("%", "%%")


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """``-v`` and ``-vv``, for ``parser`` and every verb below it."""
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=argparse.SUPPRESS,
        help="say more on stderr: -v what is decided, -vv everything, and where an error came from",
    )
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                add_verbosity(verb)


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Options of ``generate()``; ``max_new_tokens`` is the default of that one."""
    group = parser.add_argument_group("sampling (names and meanings as in transformers; default: the model's generation config)")
    group.add_argument("--max-new-tokens", type=count(), default=max_new_tokens, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help=f"sample, or take the likeliest token; {', '.join(map(_option, _SAMPLES))} sample where nothing is said",
    )
    for name, text in _SAMPLING.items():
        kind = RANGES[name]
        group.add_argument(_option(name), type=Number(kind), metavar="INT" if kind.whole else "FLOAT", help=text)
    group.add_argument("--seed", type=count(0, (1 << 64) - 1), metavar="N", help="make sampling repeatable")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for values without a meaning and for options that contradict each other; imports no torch."""
    if hasattr(arguments, "ram"):
        offload_config(arguments, OffloadConfig.context_length)
    if getattr(arguments, "do_sample", None) is False:
        for name in _SAMPLES:
            value = getattr(arguments, name)
            if value is not None and not (name == "temperature" and value < GREEDY_BELOW):
                raise ConfigError(f"{_option(name)} is for sampling, and --no-do-sample takes the likeliest token; omit one")


def model_name(text: str) -> str:
    """A model as the command line was given it, where the name of a store under $FATE_HOME becomes its path."""
    store = None if os.path.exists(text) else find_store(text)
    return text if store is None else str(store)


def store_of(arguments: argparse.Namespace) -> Path:
    """The store of the verb's model, converted or built on first use."""
    from fate_moe.engine.prepare import store_for

    return store_for(with_demo_chat(arguments.model), arguments.precision, arguments.dense_precision)


def with_demo_chat(model: str | None) -> str | None:
    """``model``; "demo-chat", which ``model_name`` leaves as it is until that store exists, becomes its store, built now."""
    if model != demo.CHAT or os.path.exists(model):
        return model
    from fate_moe.tools.demo_chat import demo_chat_store

    return str(demo_chat_store())


def offload_config(arguments: argparse.Namespace, context_length: int) -> OffloadConfig:
    """The parsed offload options (defaults for those that the verb has not); ``context_length`` where none was given."""
    options = {name: getattr(arguments, name) for name in DEFAULTS if hasattr(arguments, name)}
    options["context_length"] = context_length if arguments.context_length is None else arguments.context_length
    return OffloadConfig.from_options(options)


def require_gpu(arguments: argparse.Namespace) -> None:
    """Raise ConfigError, before anything is converted, for options that contradict each other or a GPU that cannot be used."""
    if offload_config(arguments, OffloadConfig.context_length).on_gpu:
        from fate_moe.gpu.device import find_gpu

        find_gpu()


def generate_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``generate()``; seeds the generator where a seed was given.

    A temperature of 0 is greedy whatever --do-sample says; an option that only sampling has asks for sampling.
    """
    import torch

    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "do_sample", *_SAMPLING)}
    options = {name: value for name, value in options.items() if value is not None}
    if options.get("temperature", 1.0) < GREEDY_BELOW:
        return {**options, "do_sample": False, "temperature": 1.0}
    if any(name in options for name in _SAMPLES):
        options.setdefault("do_sample", True)
    return options


def quiet_transformers() -> None:
    """No bars of its own from transformers, and no warnings unless -v asks for them."""
    import transformers

    if not logging.getLogger("fate_moe").isEnabledFor(logging.INFO):
        transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def print_json(facts: Mapping[str, Any]) -> None:
    """One JSON object in one line on stdout, with ``"schema"`` first."""
    print(json.dumps({"schema": JSON_SCHEMA, **facts}))


def print_table(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Rows of (what, amount, remark)."""
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    print(one_line(title))
    draw_table(table)


def draw_table(table: Any) -> None:
    """Print a rich table whose cells are text: brackets and colons in the names of files mean nothing."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    console.width = max(console.width, 20)  # COLUMNS=0, a window of no width
    console.print(table)
