"""Policies, predictors and presets by name: the one place where a name becomes an object.

The configuration checks names here, the command line lists them, loading and the simulator make objects from them. What comes with
the package is written as "module:function" and imported when it is first made, so that listing needs no torch. Add your own:

>>> from fate_moe.registry import register_policy
>>> register_policy("mine", lambda num_slots, experts_per_layer: MyPolicy(), "what it does, in a line")
>>> load("path-or-id", policy="mine")
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from fate_moe.core import EvictionPolicy, Predictor
from fate_moe.errors import ConfigError
from fate_moe.gpu.options import DeviceOptions

if TYPE_CHECKING:
    from fate_moe.predict.predictors import Known

__all__ = [
    "POLICIES",
    "PREDICTORS",
    "PRESETS",
    "Entry",
    "PolicyFactory",
    "PredictorFactory",
    "Preset",
    "check_name",
    "make_policy",
    "make_predictor",
    "register_policy",
    "register_predictor",
    "register_preset",
]


# (num_slots, experts_per_layer) -> policy
PolicyFactory: TypeAlias = "Callable[[int, Sequence[int]], EvictionPolicy]"
# (experts_per_layer, top_k, known, look_ahead) -> predictor. Raises ConfigError where it needs what is not known.
PredictorFactory: TypeAlias = "Callable[[Sequence[int], int, Known, int], Predictor]"


@dataclass(frozen=True)
class Entry:
    """What a name stands for. ``factory`` is a PolicyFactory or PredictorFactory, or "module:function" naming one."""

    summary: str
    factory: Callable[..., Any] | str
    built_in: bool = False

    def make(self, *arguments: Any) -> Any:
        """Call the factory, after importing it if need be."""
        factory = self.factory
        if isinstance(factory, str):
            module, _, name = factory.partition(":")
            factory = getattr(importlib.import_module(module), name)
        return factory(*arguments)


@dataclass(frozen=True)
class Preset:
    """A choice that works together: ``policy`` and ``predictor`` on the CPU, ``device`` on a GPU.

    On a GPU ``policy`` orders what is in RAM where experts come from the disk; what is in VRAM goes by ``device``.
    ``keeps_experts``: experts use what room the budget leaves. Else there is room for one token's experts of one layer, whatever
    the budget, so that nothing is left of a layer when the next token comes to it; not on a GPU, whose slots belong to layers.
    """

    summary: str
    policy: str
    predictor: str
    device: DeviceOptions = field(default_factory=DeviceOptions)
    built_in: bool = False
    keeps_experts: bool = True


def _policy(function: str, summary: str) -> Entry:
    return Entry(summary, f"fate_moe.memory.policies:{function}", built_in=True)


def _predictor(function: str, summary: str) -> Entry:
    return Entry(summary, f"fate_moe.predict.predictors:{function}", built_in=True)


# Which expert gives up its slot.
POLICIES = {
    "arc": _policy("arc", "adaptive replacement: recency and frequency, balanced by its own misses"),
    "co-activation": _policy("co_activation", "decayed, and experts often used together raise each other"),
    "decayed": _policy("decayed", "the fewest expected uses, from counts that decay with time"),
    "least-stale": _policy("least_stale", "what this pass has not used goes first"),
    "lfu": _policy("lfu", "the least frequently used; old uses count less"),
    "lru": _policy("lru", "the least recently used"),
    "shallow-arc": _policy("shallow_arc", "the first layers stay, the others compete by arc (Fate)"),
}
# Which experts are read ahead of their router.
PREDICTORS = {
    "activation-path": _predictor("activation_path", "what followed the same path of experts before (EAP)"),
    "combined": _predictor("combined", "all that is there: fitted gates, routers, forecast and history, as probabilities"),
    "cross-layer": _predictor("cross_layer", "the next layer's router on this layer's input (Fate)"),
    "cross-layer-norm": _predictor("cross_layer_norm", "the same behind the next layer's own norm, as probabilities"),
    "cross-layer-probability": _predictor("cross_layer_probability", "cross-layer, as probabilities"),
    "forecast": _predictor("forecast", "a whole token from its embedding; needs: fate fit --forecast"),
    "learned": _predictor("learned", "gates that `fate fit` fitted; without them the same as recursive"),
    "none": _predictor("none", "nothing is read ahead"),
    "recursive": _predictor("recursive", "routers one after the other, each on an estimate of its own input"),
    "temporal": _predictor("temporal", "what the token before used"),
}
# What works best here, and what published systems do.
PRESETS = {
    "best": Preset("what is fastest here", "co-activation", "combined", built_in=True),
    "eap": Preset(
        "expert activation paths, as in MoE-Infinity",
        "lfu",
        "activation-path",
        DeviceOptions(eviction="frequency", activation_path=True),
        built_in=True,
    ),
    "fate": Preset(
        "the Fate paper's system",
        "shallow-arc",
        "cross-layer",
        DeviceOptions(eviction="recency", num_whole=4, overlap=False),
        built_in=True,
    ),
    "load-on-demand": Preset(
        "an LRU cache and no prefetching",
        "lru",
        "none",
        DeviceOptions(eviction="recency", limit=0, overlap=False),
        built_in=True,
    ),
    "lod-paper": Preset(
        "no cache: every expert is read for every token, as the Fate paper's load-on-demand must have done",
        "lru",
        "none",
        built_in=True,
        keeps_experts=False,
    ),
}


def check_name(kind: str, name: str, choices: Iterable[str]) -> None:
    """Raise ConfigError, naming the nearest of ``choices``, if ``name`` is none of them."""
    if name not in (known := list(choices)):
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{kind} {name!r} is not one of {', '.join(known)}{hint}")


def make_policy(name: str, num_slots: int, experts_per_layer: Sequence[int]) -> EvictionPolicy:
    """The policy called ``name`` for ``num_slots`` slots and so many experts in each MoE layer.

    Raises ConfigError for a name that does not exist.
    """
    check_name("policy", name, POLICIES)
    policy: EvictionPolicy = POLICIES[name].make(num_slots, experts_per_layer)
    return policy


def make_predictor(name: str, experts_per_layer: Sequence[int], top_k: int, known: Known, look_ahead: int = 1) -> Predictor:
    """The predictor called ``name`` for up to ``look_ahead`` layers.

    Raises ConfigError for a name that does not exist, and for a predictor that needs what is not ``known``.
    """
    check_name("predictor", name, PREDICTORS)
    predictor: Predictor = PREDICTORS[name].make(list(experts_per_layer), top_k, known, look_ahead)
    return predictor


def register_policy(name: str, factory: PolicyFactory, summary: str = "") -> None:
    """Let ``OffloadConfig(policy=name)`` and ``--policy name`` mean what ``factory`` makes; again replaces it.

    Raises ConfigError for the name of a policy that comes with the package.
    """
    _refuse_built_in("policy", name, POLICIES.get(name))
    POLICIES[name] = Entry(summary, factory)


def register_predictor(name: str, factory: PredictorFactory, summary: str = "") -> None:
    """Let ``OffloadConfig(predictor=name)`` and ``--predictor name`` mean what ``factory`` makes; again replaces it.

    Raises ConfigError for the name of a predictor that comes with the package.
    """
    _refuse_built_in("predictor", name, PREDICTORS.get(name))
    PREDICTORS[name] = Entry(summary, factory)


def register_preset(name: str, preset: Preset) -> None:
    """Let ``OffloadConfig(preset=name)`` mean ``preset``; again replaces it.

    Raises ConfigError for the name of a preset that comes with the package, or where ``preset`` names what does not exist.
    """
    _refuse_built_in("preset", name, PRESETS.get(name))
    check_name("policy", preset.policy, POLICIES)
    check_name("predictor", preset.predictor, PREDICTORS)
    PRESETS[name] = preset


def _refuse_built_in(kind: str, name: str, known: Entry | Preset | None) -> None:
    if known is not None and known.built_in:
        raise ConfigError(f"{kind} {name!r} comes with the package; choose another name for yours")
