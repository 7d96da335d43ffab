"""The experts' memory of a native step that asks Python for everything: right in every case, whoever observes or predicts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fate_moe.runtime import ExpertRuntime

__all__ = ["RuntimeMemory"]

_SIZES = {torch.bfloat16: 2, torch.int64: 8, torch.float32: 4}


class RuntimeMemory:
    """The methods that the extension's CallbackMemory calls (csrc/expert_memory.h says what they mean)."""

    def __init__(self, runtime: ExpertRuntime, top_k: Sequence[int], hidden: int) -> None:
        """``top_k`` by MoE layer."""
        self._runtime, self._top_k, self._hidden = runtime, top_k, hidden
        self._places: dict[int, int] = {}  # of the layer's experts in what the extension was given
        self._arriving: Iterator[list[tuple[int, int, int]]] = iter(())

    def acquire(self, layer: int, experts: Sequence[int], num_rows: int, inputs: int, chosen: int, weights: int) -> None:
        """``inputs`` bf16 [num_rows, hidden], ``chosen`` int64 and ``weights`` fp32 [num_rows, top_k] are addresses."""
        routed = (num_rows, self._top_k[layer])
        self._runtime.begin(
            layer,
            _at(inputs, (num_rows, self._hidden), torch.bfloat16),
            _at(chosen, routed, torch.int64),
            _at(weights, routed, torch.float32),
        )
        self._places = {expert: place for place, expert in enumerate(experts)}
        self._arriving = self._runtime.arriving()

    def arrived(self) -> list[tuple[int, int, int]]:
        """Places, addresses and planes."""
        places = self._places
        return [(places[expert], address, planes) for expert, address, planes in next(self._arriving)]

    def release(self) -> None:
        self._runtime.end()


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on memory that somebody else keeps."""
    num_bytes = shape[0] * shape[1] * _SIZES[dtype]
    memory: Any = (ctypes.c_char * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
