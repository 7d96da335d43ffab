"""Preset ``eap`` on a GPU: experts are prefetched by the sequences that were most like this one."""

from __future__ import annotations

from typing import Any

import torch

from fate_moe.gpu.experts import DeviceExperts
from fate_moe.layers.cuda_step import FusedStep

__all__ = ["PathStep"]

COLLECTION = 64  # sequences that are remembered, as on the CPU (predict/activation_path.py)


class PathStep(FusedStep):
    """A step whose prefetches come from the activation path (MoE-Infinity, arXiv 2401.14361): before each token, the sequence of
    the collection whose activations are most like this one's so far; its experts by their share in it.

    A sequence's matrix is the residency tables' decayed use, so matching needs no host. With an empty collection this sequence's
    own stands in.
    """

    def __init__(self, model: Any, experts: DeviceExperts, cache: Any, collection: torch.Tensor | None = None) -> None:
        """``collection`` fp32 [sequences, layers, experts], each of length 1; None: an empty one, for ``keep``."""
        super().__init__(model, experts, cache)
        self._tables, self._half_life = experts.state.tables, experts.state.options.half_life
        score = experts.state.tables.score
        self.collection = score.new_zeros(COLLECTION, *score.shape) if collection is None else collection
        self.predicted = torch.zeros_like(score)
        self._kept, self.most_rows = 0, 1  # the tables' use is one sequence's

    @torch.no_grad()
    def step(self, rows: int = 1) -> None:
        running = self._running()
        nearest = (self.collection.flatten(1) @ running.flatten()).argmax(0, keepdim=True)
        match = self.collection.index_select(0, nearest)[0]
        match = torch.where(match.sum() > 0, match, running)
        assert self.predicted is not None
        self.predicted.copy_((match / match.sum(1, keepdim=True).clamp(min=1e-9) + 1e-9).log())
        super().step(rows)

    def keep(self) -> None:
        """The sequence has ended: its matrix joins the collection, in the oldest one's place if that is full."""
        matrix = self._running()
        self.collection[self._kept % len(self.collection)] = matrix / matrix.norm().clamp(min=1e-9)
        self._kept += 1

    def _running(self) -> torch.Tensor:
        tables = self._tables
        return torch.exp2(tables.score - tables.clock / self._half_life) * (tables.score > 0)
