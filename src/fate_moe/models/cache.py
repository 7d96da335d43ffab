"""A KV cache with room to grow: a new token is written behind the others, which transformers' own copies every time."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["RoomyLayer", "make_room"]

LEAST_ROOM = 64  # tokens; else a quarter of what is there


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """DynamicLayer whose keys and values [batch, heads, tokens, head_dim] are views of larger buffers.

    Whoever puts other tensors in their place (cropping, beams) is obeyed: they are copied at the next update. No more than
    ``most_tokens`` (over the batch) are ever set aside, unless so many are there.
    """

    def __init__(self, most_tokens: int) -> None:
        super().__init__()
        self._most_tokens = most_tokens
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None  # [batch, heads, room, head_dim] each
        self._given: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # what keys and values were set to last

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, count = self.get_seq_length(), key_states.shape[-2]
        for buffer, states in zip(self.reserve(count, key_states, value_states), (key_states, value_states), strict=True):
            buffer[:, :, past : past + count] = states
        self.extend(count)
        return self.keys, self.values

    def reserve(self, count: int, *like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers of keys and values, with what is cached in them and room for ``count`` more tokens.

        ``like``: new keys and values, for their shapes; may be left out where something is cached already.
        """
        past = self.get_seq_length()
        mine = self.keys is self._given[0] and self.values is self._given[1]
        if self.room is None or not mine or self.room[0].shape[2] < past + count:
            old = (self.keys, self.values)
            shapes = like or old
            wanted = past + count
            most = max(wanted, self._most_tokens // max(1, shapes[0].shape[0]))
            length = min(most, wanted + max(LEAST_ROOM, wanted // 4))
            keys, values = (torch.empty(*x.shape[:2], length, x.shape[3], dtype=self.dtype, device=self.device) for x in shapes)
            for buffer, kept in zip((keys, values), old, strict=True):
                if past:
                    buffer[:, :, :past] = kept
            self.room = (keys, values)
        return self.room

    def extend(self, count: int) -> None:
        """``count`` tokens were written to the reserved buffers behind the others."""
        assert self.room is not None
        length = self.get_seq_length() + count
        self._given = self.keys, self.values = self.room[0][:, :, :length], self.room[1][:, :, :length]


def make_room(cache: Any, most_tokens: int) -> None:
    """Give the layers of a DynamicCache room, those that keep every token; other caches stay as they are."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = roomy = RoomyLayer(most_tokens)
            vars(roomy).update(vars(layer))
