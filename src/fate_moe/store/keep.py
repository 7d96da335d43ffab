"""Which layers a mixed store keeps in another precision: what people write, and what fits under a size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fate_moe.core import PRECISIONS
from fate_moe.errors import ConfigError

__all__ = ["choose_precisions", "parse_keep"]


def parse_keep(text: str, num_layers: int) -> dict[int, str]:
    """Precision by MoE layer from "layers.0-1:lossless,layers.5:int4"; a later rule wins.

    Raises ConfigError for anything else, and for layers that the model has not.
    """
    kept: dict[int, str] = {}
    for rule in text.split(","):
        match = re.fullmatch(r"\s*layers\.(\d+)(?:-(\d+))?:([\w-]+)\s*", rule)
        if not match or match[3] not in PRECISIONS:
            raise ConfigError(f"{rule!r} is no rule of --keep; write for example layers.0-1:lossless ({', '.join(PRECISIONS)})")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise ConfigError(f"{rule!r} names MoE layers {first} to {last}, the model has layers 0 to {num_layers - 1}")
        kept.update(dict.fromkeys(range(first, last + 1), match[3]))
    return kept


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
