"""One family, tried from its checkpoint's keys to its logits, each step under a name that a failure gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fate_moe.adapter.contract import is_experts
from fate_moe.adapter.meta_model import expert_stacks
from fate_moe.adapter.table import Family
from fate_moe.checkpoints.mapping import match_names
from fate_moe.checkpoints.source import Checkpoint
from fate_moe.engine.attach import routers_of
from fate_moe.engine.patches import Patches
from fate_moe.engine.prepare import prepare
from fate_moe.layers.model_step import around_reasons, prefixes_kept
from fate_moe.layers.plain import NotPlain, plain_decoder
from fate_moe.layers.reasons import attention_reasons
from fate_moe.store.convert import convert
from tests.support.engines import load_model
from tests.support.tiny import text_part, tiny_config, tiny_model

TOKENS = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(0))
TOLERANCE = 3e-5


RECIPE = "transformers builds and runs the tiny model"


class BrokenRuleError(Exception):
    """A family does not fit; the message says which of the rules it breaks."""


@contextmanager
def rule(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenRuleError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenRuleError(f"{name}: {reason}"[:300]) from error


def examine(family: str, folder: Path) -> Family:
    """Save a tiny random model of ``family`` as transformers does, convert it, run it with one layer's top-k resident, compare.

    Raises BrokenRuleError where it does not run, or runs to other numbers.
    """
    with rule("a tiny configuration (tests/support/tiny.py) is accepted"):
        tiny_config(family)
    with rule(RECIPE):
        model = tiny_model(family)
        wanted = _logits(text_part(model))
        if (count := len(expert_stacks(text_part(model)))) < 1:
            raise BrokenRuleError(f"transformers builds the tiny model with experts: it has {count}")
    with rule("transformers saves the checkpoint"):
        model.save_pretrained(folder / "checkpoint")
    with rule("the checkpoint's keys become the model's parameters (transformers' conversion mapping)"):
        store = convert(folder / "checkpoint", folder / "store")
    with rule("the store opens"):
        prepared = prepare(store)
        needs = prepared.footprint()
    keys = _keys_of_first_layer(prepared.model, folder / "checkpoint")
    with rule("it runs with one layer's top-k resident"):
        small = load_model(store, expert_cache=str(needs.min_slots * needs.slot_bytes))
        exact = _early_and_right(small)
        got = _logits(small)
        small.fate.close()
    if (difference := float((got - wanted).abs().max())) > TOLERANCE:
        raise BrokenRuleError(f"logits are transformers' own: they differ by {difference:.2g}")
    with rule("it runs with every expert resident"):
        large = load_model(store, expert_cache="100%")
        if not torch.equal(_logits(large), got):
            raise BrokenRuleError("budgets do not change a bit: one layer's top-k and all experts differ")
        large.fate.close()
    _experts_matter(text_part(model), wanted)
    look_ahead = f"{sum(exact.values())}/{len(exact)}"
    layers, prefixes = _recognised(prepared.model), prefixes_of(prepared.model)
    return Family(family, type(text_part(model)).__name__, "ok", look_ahead, keys, layers, prefixes)


def prefixes_of(model: Any) -> str:
    """As ``Family.prefixes``."""
    if _recognised(model) != "recognised":
        return "its layers are not run whole"
    return "; ".join(around_reasons(model)) or f"reused: {prefixes_kept(model)}"


def _recognised(model: Any) -> str:
    """Whether all layers of the decoder are plain ones that the CPU runs whole, else why not."""
    reasons = [
        reason
        for layer in plain_decoder(model)
        for reason in (layer.reasons if isinstance(layer, NotPlain) else attention_reasons(layer.attention))
    ]
    return "; ".join(dict.fromkeys(reasons)) or "recognised"


def _logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)  # block diffusion begins with random tokens
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def _early_and_right(model: Any) -> dict[int, bool]:
    """Filled while ``model`` runs: for each MoE block that text enters, whether asking its router early gave what it then chose."""
    runtime, routers = model.fate.runtime, routers_of(model, expert_stacks(model), Patches(model))
    enter, compute = runtime.enter, runtime.compute
    said: dict[int, torch.Tensor] = {}
    right: dict[int, bool] = {}

    def entering(layer: int, hidden: torch.Tensor, training: bool) -> None:
        route = routers[layer]
        if route is not None:
            said[layer] = route(hidden.reshape(-1, hidden.shape[-1])).experts
        enter(layer, hidden, training)

    def computing(layer: int, experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        right[layer] = right.get(layer, True) and layer in said and torch.equal(said[layer], index)
        return compute(layer, experts, hidden, index, weights)  # type: ignore[no-any-return]

    runtime.enter, runtime.compute = entering, computing
    return right


def _keys_of_first_layer(model: Any, checkpoint: Path) -> tuple[str, ...]:
    stack = expert_stacks(model)[0]
    recipes = match_names(model, Checkpoint(checkpoint).names).recipes
    names = [
        name for key in stack.parameters for sources in recipes[f"{stack.name}.{key}"].sources.values() for name in sources[:1]
    ]
    return tuple(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", re.sub(r"^.*?layers\.\d+\.", "", name)) for name in names))


def _experts_matter(model: Any, wanted: torch.Tensor) -> None:
    """Guards the comparison itself: with its experts in another order the tiny model must say something else."""
    down = {id(module.down_proj): module.down_proj for module in model.modules() if is_experts(module)}
    for parameter in down.values():
        with torch.no_grad():
            parameter.copy_(parameter.flip(0))
    if (_logits(model) - wanted).abs().max() < 1e-4:
        raise BrokenRuleError("the tiny model's routed experts matter: its logits stay when they change")
