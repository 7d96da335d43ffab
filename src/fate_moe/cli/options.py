"""What verbs share: groups of options, what they become, and tables."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from fate_moe.config import DEVICES, POLICIES, PRECISION_POLICIES, PREDICTORS, PRESETS, OffloadConfig
from fate_moe.core import PRECISIONS

__all__ = [
    "DEFAULTS",
    "MODEL_HELP",
    "add_offload_options",
    "add_sampling_options",
    "generate_options",
    "offload_config",
    "print_table",
    "quiet_transformers",
    "require_gpu",
]

MODEL_HELP = "checkpoint folder, GGUF file, hub id or store; none: the embedded model"
DEFAULTS = {field.name: field.default for field in fields(OffloadConfig)}
# Options of generate(), by their names in transformers.
_SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "higher is more surprising"),
    "top_k": (int, "sample among the k likeliest tokens"),
    "top_p": (float, "sample among the likeliest tokens that together have this probability"),
    "min_p": (float, "drop tokens below this share of the likeliest one's probability"),
    "repetition_penalty": (float, "above 1.0 discourages repeating"),
    "num_beams": (int, "beam search"),
}


def add_offload_options(parser: argparse.ArgumentParser, gpu: bool = False) -> None:
    """One option for every field of OffloadConfig; those of a GPU for verbs that can use one."""
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
            help="of the experts missing in VRAM, how many the CPU computes instead of copying them (auto: as doctor --measure "
            "measured); it rounds otherwise, so that tokens may depend on what is in VRAM; default: %(default)s",
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
        "--preset", choices=PRESETS, default=DEFAULTS["preset"], help="who is kept and who is read ahead; default: %(default)s"
    )
    group.add_argument("--policy", choices=POLICIES, help="who gives up a slot; default: the preset's")
    group.add_argument("--predictor", choices=PREDICTORS, help="who is read ahead; default: the preset's")
    group.add_argument(
        "--look-ahead", type=int, default=DEFAULTS["look_ahead"], metavar="K", help="layers predicted ahead; default: %(default)s"
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
    group.add_argument("--context-length", type=int, metavar="N", help="tokens to set KV cache aside for; run: as many as it needs")
    group.add_argument(
        "--io-threads", type=int, default=DEFAULTS["io_threads"], metavar="N", help="reads at once; default: %(default)s"
    )
    group.add_argument(
        "--exact-activations", action="store_true", help="multiply quantized weights with fp32 activations, not int8 ones"
    )


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Options of ``generate()``; ``max_new_tokens`` is the default of that one."""
    group = parser.add_argument_group("sampling (names and meanings as in transformers; default: the model's generation config)")
    group.add_argument("--max-new-tokens", type=_positive, default=max_new_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--do-sample", action=argparse.BooleanOptionalAction, help="sample, or take the likeliest token")
    for name, (kind, text) in _SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    group.add_argument("--seed", type=int, metavar="N", help="make sampling repeatable")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def offload_config(arguments: argparse.Namespace, context_length: int) -> OffloadConfig:
    """The parsed offload options (defaults for those that the verb has not); ``context_length`` where none was given."""
    options = {name: getattr(arguments, name) for name in DEFAULTS if hasattr(arguments, name)}
    options["context_length"] = context_length if arguments.context_length is None else arguments.context_length
    return OffloadConfig.from_options(options)


def require_gpu(arguments: argparse.Namespace) -> None:
    """Raise ConfigError if a GPU is asked for and none can be used, before anything is converted."""
    if OffloadConfig(device=arguments.device, vram=arguments.vram).on_gpu:
        from fate_moe.gpu.device import find_gpu

        find_gpu()


def generate_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``generate()``; seeds the generator where a seed was given."""
    import transformers

    if arguments.seed is not None:
        transformers.set_seed(arguments.seed)
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "do_sample", *_SAMPLING)}
    return {name: value for name, value in options.items() if value is not None}


def quiet_transformers() -> None:
    """No warnings and bars of its own from transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def print_table(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Rows of (what, amount, remark)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    print(title)
    Console().print(table)
