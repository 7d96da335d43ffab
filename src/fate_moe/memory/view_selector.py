"""How many sections of each expert to read: asks the precision policy, and counts what was computed with."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from fate_moe.core import BlobLayout, ExpertId, Need, PrecisionPolicy, Routing
from fate_moe.memory.residency import Residency
from fate_moe.memory.table import WHOLE
from fate_moe.quant.dtypes import TORCH_DTYPES

__all__ = ["ViewSelector", "chosen_weights"]


class ViewSelector:
    """Between routing and residency. Without a policy every expert is wanted whole, and uses are only counted."""

    def __init__(self, policy: PrecisionPolicy | None, layouts: Sequence[Sequence[BlobLayout]], residency: Residency) -> None:
        """``layouts`` by layer and expert."""
        self._short: Counter[tuple[ExpertId, int]] = Counter()  # how often an expert was computed with so many bits, not all
        self._whole = array("q", bytes(8 * sum(map(len, layouts))))  # how often with all of them, by layer and expert
        self._first = list(accumulate(map(len, layouts), initial=0))  # of a layer's experts among all
        self.policy = policy
        self._residency = residency
        # By expert: the bits that a read of all sections up to a plane's brings; scales and zeros are the section before planes.
        views = {layout: list(accumulate(layout.plane_widths)) or [_bits(layout)] for of_layer in layouts for layout in of_layer}
        self._views = [[views[layout] for layout in of_layer] for of_layer in layouts]
        self._longest = [max(of_layer, key=len) for of_layer in self._views]

    def sections(
        self, layer: int, rows: Mapping[int, Sequence[int]], weighing: Routing | torch.Tensor, affordable: float
    ) -> dict[ExpertId, int] | None:
        """How many sections of each expert in ``rows`` (rows of the flat routing by expert) are wanted; None: all of all.

        ``weighing``: the routing weights [num_tokens, top_k] or the routing they come from. ``affordable``: how many experts can be
        read while a layer computes.
        """
        views = self._longest[layer]
        if self.policy is None or len(views) < 2:
            return None
        flat = (chosen_weights(weighing) if isinstance(weighing, Routing) else weighing).reshape(-1).tolist()
        experts = [ExpertId(layer, expert) for expert in rows]
        needs = [
            Need(len(chosen), sum(flat[row] for row in chosen), self._held_bits(expert))
            for expert, chosen in zip(experts, rows.values(), strict=True)
        ]
        bits = self.policy.bits(needs, views, affordable * views[-1])
        return {
            expert: views.index(view) + 2
            for expert, view in zip(experts, bits, strict=True)
            if view < views[-1] and self._views[layer][expert.expert] is views  # others are stored in a precision without views
        }

    def num_planes(self, expert: ExpertId) -> int | None:
        """The planes that ``expert``'s slot holds now (None: all); counts as one use."""
        held = self._residency.held(expert)
        views = self._views[expert.layer][expert.expert]
        if held != WHOLE:
            self._short[expert, views[held - 2]] += 1
            return held - 1
        self._whole[self._first[expert.layer] + expert.expert] += 1
        return None

    def count_whole(self, layer: int, experts: Sequence[int]) -> None:
        """Each of ``experts`` was computed once with all its bits."""
        first, whole = self._first[layer], self._whole
        for expert in experts:
            whole[first + expert] += 1

    def count(self, layer: int, experts: Sequence[int], num_planes: Sequence[int]) -> None:
        """Each of ``experts`` was computed once, with so many planes (0: all)."""
        self.count_whole(layer, [expert for expert, planes in zip(experts, num_planes, strict=True) if not planes])
        for expert, planes in zip(experts, num_planes, strict=True):
            if planes:
                self._short[ExpertId(layer, expert), self._views[layer][expert][planes - 1]] += 1

    @property
    def counts(self) -> tuple[array[int], list[int]]:
        """What ``count_whole`` counts in: by layer and expert; and where each layer begins and the last one ends."""
        return self._whole, self._first

    @property
    def used(self) -> Counter[tuple[ExpertId, int]]:
        """How often each expert was computed with so many bits. From any thread, also while the model runs."""
        used, whole = self._short.copy(), iter(self._whole.tolist())
        for layer, of_layer in enumerate(self._views):
            for expert, views in enumerate(of_layer):
                if count := next(whole):
                    used[ExpertId(layer, expert), views[-1]] += count
        return used

    def uses(self) -> array[int]:
        """How often each expert was computed, layer after layer; a copy, cheap enough to be taken every few tokens."""
        uses = self._whole[:]
        for (expert, _), count in self._short.copy().items():
            uses[self._first[expert.layer] + expert.expert] += count
        return uses

    def by_bits(self) -> dict[int, int]:
        """Uses by bits, over all experts."""
        total: Counter[int] = Counter()
        for (_, bits), uses in self.used.items():
            total[bits] += uses
        return dict(sorted(total.items()))

    def _held_bits(self, expert: ExpertId) -> int:
        held, views = self._residency.held(expert), self._views[expert.layer][expert.expert]
        return views[-1] if held == WHOLE else views[held - 2] if held else 0


def chosen_weights(routing: Routing) -> torch.Tensor:
    """Routing weights [num_tokens, top_k] of the chosen experts from their scores: a token's add up to 1.

    Scores may be logits or probabilities; those between 0 and 1 are taken for probabilities.
    """
    index = routing.experts.clamp(0, routing.scores.shape[-1] - 1)
    scores = routing.scores.float().gather(-1, index)
    if bool(((scores < 0) | (scores > 1)).any()):
        return scores.softmax(-1)
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-9)


def _bits(layout: BlobLayout) -> int:
    """Of one weight in a layout without planes."""
    return TORCH_DTYPES[layout.parts[0].dtype].itemsize * 8
