"""What a mixed store keeps in another precision: what people write, and what fits under a size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fate_moe.core import PRECISIONS, ExpertId
from fate_moe.errors import ConfigError

__all__ = ["PrecisionRules", "choose_precisions", "parse_precision_rules", "precisions_of"]

# Precision by MoE layer, or by expert where that is said.
PrecisionRules = Mapping[int | ExpertId, str]

_RULE = re.compile(r"\s*layers\.(\d+)(?:-(\d+))?(?:\.experts\.(\d+)(?:-(\d+))?)?:([\w-]+)\s*")


def parse_precision_rules(text: str, num_experts: Sequence[int]) -> dict[int | ExpertId, str]:
    """What "layers.0-1:lossless,layers.3.experts.7:int8" keeps; ranges of either, a later rule wins.

    ``num_experts`` by MoE layer. Raises ConfigError for anything else, and for layers and experts that the model has not.
    """
    kept: dict[int | ExpertId, str] = {}
    for rule in text.split(","):
        match = _RULE.fullmatch(rule)
        if not match or match[5] not in PRECISIONS:
            raise ConfigError(
                f"{rule!r} is no rule of --precision-rules; write for example layers.0-1:lossless or layers.3.experts.7:int8 "
                f"({', '.join(PRECISIONS)})"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < len(num_experts):
            raise ConfigError(f"{rule!r} names MoE layers {first} to {last}, the model has layers 0 to {len(num_experts) - 1}")
        for layer in range(first, last + 1):
            if match[3] is None:
                kept = {key: name for key, name in kept.items() if not (isinstance(key, ExpertId) and key.layer == layer)}
                kept[layer] = match[5]
                continue
            begin, end = int(match[3]), int(match[4] or match[3])
            if not begin <= end < num_experts[layer]:
                raise ConfigError(
                    f"{rule!r} names experts {begin} to {end}, MoE layer {layer} has experts 0 to {num_experts[layer] - 1}"
                )
            kept.update({ExpertId(layer, expert): match[5] for expert in range(begin, end + 1)})
    return kept


def precisions_of(layer: int, num_experts: int, precision: str, keep: PrecisionRules) -> list[str]:
    """The precision of each expert of MoE layer ``layer``: ``precision`` but for what is kept.

    Raises ConfigError for a kept expert that the layer has not.
    """
    for key in keep:
        if isinstance(key, ExpertId) and key.layer == layer and not 0 <= key.expert < num_experts:
            raise ConfigError(f"MoE layer {layer} has experts 0 to {num_experts - 1}, not the {key.expert} that is to be kept")
    of_layer = keep.get(layer, precision)
    return [keep.get(ExpertId(layer, expert), of_layer) for expert in range(num_experts)]


def choose_precisions(sizes: Sequence[Mapping[str, int]], harm: Sequence[Mapping[str, float]], limit: int) -> list[str]:
    """A precision for each layer so that all layers together take at most ``limit`` bytes and do the least harm.

    ``sizes`` are bytes and ``harm`` errors by layer and precision; errors of layers add up. Starts from the smallest of each layer
    and buys, one layer at a time, what undoes most harm per byte and still fits. Raises ConfigError if the smallest do not fit.
    """
    chosen = [min(of_layer, key=lambda name: of_layer[name]) for of_layer in sizes]
    left = limit - sum(of_layer[name] for of_layer, name in zip(sizes, chosen, strict=True))
    if left < 0:
        raise ConfigError(f"the smallest precision of all layers takes {limit - left} bytes, {-left} more than {limit}; allow more")
    while True:
        offers = [
            ((harm[layer][chosen[layer]] - harm[layer][name]) / (size - sizes[layer][chosen[layer]]), layer, name)
            for layer, of_layer in enumerate(sizes)
            for name, size in of_layer.items()
            if 0 < size - of_layer[chosen[layer]] <= left and harm[layer][name] < harm[layer][chosen[layer]]
        ]
        if not offers:
            return chosen
        _, layer, name = max(offers)
        left -= sizes[layer][name] - sizes[layer][chosen[layer]]
        chosen[layer] = name
