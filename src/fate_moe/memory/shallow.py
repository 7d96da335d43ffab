"""Fate's shallow-favouring expert cache. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fate_moe.core import EvictionPolicy, ExpertId
from fate_moe.memory.arc import ARC

__all__ = ["ShallowARC", "shallow_quotas"]

NUM_SHALLOW_LAYERS = 4


def shallow_quotas(num_slots: int, experts_per_layer: Sequence[int]) -> list[int]:
    """How many slots each layer may call its own; they sum to ``num_slots`` or to all experts, whichever is less.

    The first layers, where prediction is worst, are kept whole: up to four, as many as fit in half the slots. The others share what
    remains evenly, the shallower of them taking the odd ones. (Fate, arXiv 2502.12224, section 4.2; "half" is ours, so that small
    caches do not starve the deep layers.)
    """
    quotas = [0] * len(experts_per_layer)
    left, whole = num_slots, 0
    for layer, num_experts in enumerate(experts_per_layer[:NUM_SHALLOW_LAYERS]):
        if num_slots - left + num_experts > num_slots // 2:
            break
        quotas[layer], left, whole = num_experts, left - num_experts, layer + 1
    sharing = list(range(whole, len(experts_per_layer)))
    while left and sharing:
        share, odd = divmod(left, len(sharing))
        for position, layer in enumerate(sharing):
            more = min(share + (position < odd), experts_per_layer[layer] - quotas[layer])
            quotas[layer] += more
            left -= more
        sharing = [layer for layer in sharing if quotas[layer] < experts_per_layer[layer]]
    return quotas


class ShallowARC(EvictionPolicy):
    """Each layer has its quota of slots (``shallow_quotas``) and its own ARC over them.

    A layer at its quota gives up one of its own; one below takes from the layer that is furthest above (slots nobody wanted
    yet are lent). Where nothing of that is evictable, any expert that is will do.
    """

    def __init__(self, num_slots: int, experts_per_layer: Sequence[int]) -> None:
        self.quotas = shallow_quotas(num_slots, experts_per_layer)
        self._layers = [ARC(max(1, quota)) for quota in self.quotas]

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._layers[expert.layer].admitted(expert, prefetched=prefetched)

    def touched(self, expert: ExpertId) -> None:
        self._layers[expert.layer].touched(expert)

    def removed(self, expert: ExpertId) -> None:
        self._layers[expert.layer].removed(expert)

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        own = incoming.layer
        if self._over(own) >= 0:
            victim = self._layers[own].victim(incoming, evictable)
            if victim is not None:
                return victim
        for layer in sorted(range(len(self._layers)), key=lambda layer: (self._over(layer), layer), reverse=True):
            victim = self._layers[layer].victim(incoming, evictable)
            if victim is not None:
                return victim
        return None

    def _over(self, layer: int) -> int:
        return len(self._layers[layer]) - self.quotas[layer]
