"""Options that make a verb draft tokens, and the assistant that they may ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fate_moe.cli.options import MODEL_HELP, model_name, with_demo_chat
from fate_moe.errors import ConfigError
from fate_moe.schedule.speculation import DEFAULT, MODES, Mode

if TYPE_CHECKING:
    from fate_moe.config import OffloadConfig
    from fate_moe.engine.prepare import Prepared

__all__ = ["add_speculation", "plan_with_assistant", "speculation_of"]


def add_speculation(group: Any) -> None:
    """``--speculate`` and ``--assistant``, for an argument group or a parser."""
    group.add_argument(
        "--speculate",
        choices=MODES,
        help="check in the pass of the last token those that may follow it, because they followed the same words before (lookup) "
        "or because a small model says so (assistant), as many as are measured to pay from either (auto), or none; the text is "
        f"the same. For models that run whole in the extension with quantized weights; default: {DEFAULT}, with --assistant auto",
    )
    group.add_argument(
        "--assistant",
        type=model_name,
        metavar="MODEL",
        help=f"a small model with the same tokenizer that writes drafts, within --ram: {MODEL_HELP}",
    )


def speculation_of(arguments: argparse.Namespace, beams: int = 1) -> Mode:
    """What is drafted; nothing for ``beams``, where nobody says. Raises ConfigError for options that contradict each other."""
    if arguments.assistant is None:
        if arguments.speculate == "assistant":
            raise ConfigError("--speculate assistant needs the small model: give --assistant MODEL")
        return arguments.speculate or (DEFAULT if beams == 1 else "off")
    if arguments.speculate in ("off", "lookup"):
        raise ConfigError(f"--assistant is not asked with --speculate {arguments.speculate}; omit one of them")
    return arguments.speculate or "auto"


def plan_with_assistant(
    arguments: argparse.Namespace, prepared: Prepared, config: OffloadConfig, tokenizer: Any
) -> tuple[OffloadConfig, Any, Any]:
    """``config`` and plan of the model, and its assistant, loaded; None where none is asked for."""
    from fate_moe.engine.prepare import store_for
    from fate_moe.tools.assistants import with_assistant

    if arguments.assistant is None:
        return config, prepared.plan(config), None
    store = store_for(with_demo_chat(arguments.assistant), arguments.precision, arguments.dense_precision)
    return with_assistant(arguments.assistant, store, prepared, config, tokenizer)
