"""Precision rules of a mixed store: parsing what the user writes, and choosing precisions that fit a size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fate_moe.core import PRECISIONS, ExpertId
from fate_moe.errors import ConfigError

__all__ = ["PrecisionRules", "choose_precisions", "layer_precisions", "parse_precision_rules"]

# Precision by MoE layer or by single expert; an expert's rule takes precedence over its layer's.
PrecisionRules = Mapping[int | ExpertId, str]

_RULE = re.compile(r"\s*layers\.(\d+)(?:-(\d+))?(?:\.experts\.(\d+)(?:-(\d+))?)?:([\w-]+)\s*")


def parse_precision_rules(text: str, num_experts: Sequence[int]) -> dict[int | ExpertId, str]:
    """Parse rules such as "layers.0-1:lossless,layers.3.experts.7:int8"; both numbers may be ranges, and a later rule wins.

    ``num_experts`` is by MoE layer. Raises ConfigError for any other text, and for layers or experts that the model does not have.
    """
    rules: dict[int | ExpertId, str] = {}
    for rule in text.split(","):
        match = _RULE.fullmatch(rule)
        if not match or match[5] not in PRECISIONS:
            raise ConfigError(
                f"--precision-rules: {rule!r} is not a rule; write for example layers.0-1:lossless or layers.3.experts.7:int8 "
                f"(precisions: {', '.join(PRECISIONS)})"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < len(num_experts):
            raise ConfigError(f"{rule!r} names MoE layers {first} to {last}; the model has layers 0 to {len(num_experts) - 1}")
        for layer in range(first, last + 1):
            if match[3] is None:
                rules = {key: name for key, name in rules.items() if not (isinstance(key, ExpertId) and key.layer == layer)}
                rules[layer] = match[5]
                continue
            begin, end = int(match[3]), int(match[4] or match[3])
            if not begin <= end < num_experts[layer]:
                raise ConfigError(
                    f"{rule!r} names experts {begin} to {end}; MoE layer {layer} has experts 0 to {num_experts[layer] - 1}"
                )
            rules.update({ExpertId(layer, expert): match[5] for expert in range(begin, end + 1)})
    return rules


def layer_precisions(layer: int, num_experts: int, precision: str, rules: PrecisionRules) -> list[str]:
    """The precision of each expert of MoE layer ``layer``: ``precision``, unless ``rules`` name another.

    Raises ConfigError for a rule on an expert that the layer does not have.
    """
    for key in rules:
        if isinstance(key, ExpertId) and key.layer == layer and not 0 <= key.expert < num_experts:
            raise ConfigError(f"a precision rule names expert {key.expert}; MoE layer {layer} has experts 0 to {num_experts - 1}")
    default = rules.get(layer, precision)
    return [rules.get(ExpertId(layer, expert), default) for expert in range(num_experts)]


def choose_precisions(sizes: Sequence[Mapping[str, int]], errors: Sequence[Mapping[str, float]], limit: int) -> list[str]:
    """A precision for each layer, such that all layers together take at most ``limit`` bytes, with a small total error.

    ``sizes`` (bytes) and ``errors`` are by layer and precision; the errors of layers add up. Greedy: starts from each layer's
    smallest precision and repeatedly makes the upgrade that fits and removes the most error per byte. Raises ConfigError if the
    smallest precisions do not fit.
    """
    chosen = [min(layer_sizes, key=lambda name: layer_sizes[name]) for layer_sizes in sizes]
    left = limit - sum(layer_sizes[name] for layer_sizes, name in zip(sizes, chosen, strict=True))
    if left < 0:
        raise ConfigError(
            f"the experts need at least {limit - left} bytes, {-left} more than the limit of {limit}; raise the limit"
        )
    while True:
        upgrades = [
            ((errors[layer][chosen[layer]] - errors[layer][name]) / (size - sizes[layer][chosen[layer]]), layer, name)
            for layer, layer_sizes in enumerate(sizes)
            for name, size in layer_sizes.items()
            if 0 < size - layer_sizes[chosen[layer]] <= left and errors[layer][name] < errors[layer][chosen[layer]]
        ]
        if not upgrades:
            return chosen
        _, layer, name = max(upgrades)
        left -= sizes[layer][name] - sizes[layer][chosen[layer]]
        chosen[layer] = name
