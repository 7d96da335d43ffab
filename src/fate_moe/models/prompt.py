"""A prompt's pass through transformers' layers, recorded in a CUDA graph where every expert is in VRAM.

Such a pass is bound by the host: about 4000 launches, half of whose time the device waits. What a graph has recorded is of one
length, so prompts are padded to few lengths, at every budget, since a matrix product's bits may depend on its size (law 1). What
pads has no expert and comes last, where no token sees it; decoding writes over its keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from fate_moe.gpu.experts import ALL_REAL, DeviceExperts

__all__ = ["PromptPass", "padded_length"]

_log = logging.getLogger(__name__)

SHORTEST = 64


def padded_length(tokens: int) -> int:
    """The next multiple of 64, or from 512 tokens on of a quarter of the power of two below: at most a quarter more."""
    step = max(SHORTEST, (1 << (tokens.bit_length() - 1)) // 4)
    return -(-tokens // step) * step


class PromptPass:
    """Reads prompts into ``cache`` (transformers' StaticCache of one sequence and ``length`` tokens), from its start on.

    A length is recorded when it comes for the second time, which takes as long as two passes.
    """

    def __init__(self, forward: Callable[..., Any], experts: DeviceExperts, cache: Any, length: int, graph: bool) -> None:
        """``forward`` is transformers' own, of the model that has ``experts``."""
        self._forward, self._experts, self._cache, self._length = forward, experts, cache, length
        device, tables = experts.pool.bytes.device, experts.tables
        self._ids = torch.zeros(1, length, dtype=torch.int64, device=device)
        self._last = torch.zeros(1, dtype=torch.int64, device=device)
        self._records = graph and device.type == "cuda" and all(quota == tables.num_experts for quota in tables.quotas)
        self._seen: set[int] = set()
        self._recorded: dict[int, tuple[Any, torch.Tensor]] = {}

    def read(self, prompt: torch.Tensor) -> torch.Tensor:
        """The logits [1, 1, vocabulary] after ``prompt`` int64 [1, tokens]."""
        tokens = prompt.shape[1]
        size = min(padded_length(tokens), self._length)
        self._ids[:, :tokens].copy_(prompt)
        self._ids[:, tokens:].zero_()
        self._last.fill_(tokens - 1)
        self._experts.num_real.fill_(tokens)
        if self._records and size in self._seen and size not in self._recorded:
            self._record(size)
        self._seen.add(size)
        if size in self._recorded:
            graph, logits = self._recorded[size]
            graph.replay()
            logits = logits.clone()
        else:
            logits = self._pass(size)
        self._experts.num_real.fill_(ALL_REAL)
        return logits

    @torch.no_grad()
    def _pass(self, size: int) -> torch.Tensor:
        for layer in self._cache.layers:
            layer.cumulative_length.zero_()
        logits: torch.Tensor = self._forward(self._ids[:, :size], past_key_values=self._cache, logits_to_keep=self._last).logits
        return logits

    def _record(self, size: int) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # a graph's memory is its own
        try:
            with torch.cuda.graph(graph):
                logits = self._pass(size)
        except torch.OutOfMemoryError:
            self._records = False
            _log.info("no VRAM left to record prompts of %d tokens", size)
        else:
            self._recorded[size] = graph, logits
