"""Loading a model with the assistant that drafts for it, both within one budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fate_moe.config import OffloadConfig
from fate_moe.engine.budget import Plan
from fate_moe.engine.load import build
from fate_moe.engine.prepare import Prepared, load_tokenizer, prepare
from fate_moe.errors import ConfigError
from fate_moe.schedule.assistant import ModelAssistant

__all__ = ["with_assistant"]

_SHARE = 4  # the assistant may take one part in so many of the budget


def with_assistant(
    name: str, store: Path, prepared: Prepared, config: OffloadConfig, tokenizer: Any
) -> tuple[OffloadConfig, Plan, ModelAssistant]:
    """The assistant in ``store``, loaded, with what ``config`` and the plan of the ``prepared`` model are beside it.

    ``name`` of the assistant, for messages. Raises ConfigError where its tokens are others than ``tokenizer``'s.
    """
    if config.on_gpu:
        raise ConfigError("an assistant is for models on the CPU; omit it, or the GPU")
    other = load_tokenizer(store)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the assistant {name} has another tokenizer ({len(other)} tokens; the model's has {len(tokenizer)}); give a model of "
            "the same family"
        )
    budget, assistant = prepared.plan(config).budget_bytes, prepare(store)
    own = OffloadConfig.from_options({"ram": budget // _SHARE, "context_length": config.context_length})
    small = assistant.plan(own)
    assert isinstance(small, Plan)
    taken = small.budget_bytes - small.left_bytes - small.runtime_bytes
    config = replace(config, ram=budget - taken)
    plan = prepared.plan(config)  # before the assistant takes memory, which would be counted twice
    assert isinstance(plan, Plan)
    plan = replace(plan, budget_bytes=plan.budget_bytes + taken, runtime_bytes=plan.runtime_bytes + taken)
    return config, plan, ModelAssistant(build(assistant, small, own))
