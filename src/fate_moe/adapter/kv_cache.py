"""A KV cache with room to grow: a new token is written behind the others, which transformers' own copies every time."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer

__all__ = ["RoomyLayer", "RoomySlidingLayer", "make_room", "room_for", "whole_cache"]

MIN_ROOM = 64  # tokens; else a quarter of what is there


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """DynamicLayer whose keys and values [batch, heads, tokens, head_dim] are the first tokens of larger buffers.

    Tensors that are put in their place (cropping, beams) are copied at the next update. No more than ``max_tokens`` (over the
    batch) are ever set aside, unless so many are there.
    """

    def __init__(self, max_tokens: int = 0) -> None:
        self.max_tokens = max_tokens
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None  # [batch, heads, room, head_dim] each; None: others are set
        self._length = 0  # of ``room``, what is filled
        self._set: list[torch.Tensor | None] = [None, None]  # without room: keys and values
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return self._set[0] if self._room is None else self._filled(self._room[0])

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._put(0, keys)

    @property
    def values(self) -> torch.Tensor | None:
        return self._set[1] if self._room is None else self._filled(self._room[1])

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._put(1, values)

    def _filled(self, buffer: torch.Tensor) -> torch.Tensor:
        """The part that holds tokens, as a view without autograd's version counter.

        It is never written again, so a write behind it must not make autograd reject a view that it saved for backward.
        """
        return (buffer if buffer.is_inference() else buffer.data)[:, :, : self._length]

    def _put(self, which: int, states: torch.Tensor | None) -> None:
        if self._room is not None:
            self._set = [self.keys, self.values]
            self._room = None
        self._set[which] = states

    def get_seq_length(self) -> int:
        if self._room is not None:
            return self._length
        keys = self._set[0]
        return keys.shape[-2] if keys is not None and keys.numel() else 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad or self.has_gradients()):
            own: tuple[Any, Any] = super().update(key_states, value_states, *args, **kwargs)
            return own  # new tensors: backward needs the earlier ones unchanged
        past, *buffers = self.reserve(count, key_states, value_states)
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, past : past + count] = states
        self.extend(count)
        return self.keys, self.values

    def reserve(self, count: int, *like: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The number of tokens that are cached, and the buffers of keys and values with room for ``count`` more behind them.

        ``like``: new keys and values, for their shapes; may be left out where something is cached already.
        """
        past = self.get_seq_length()
        if self._room is None or not self.has_room(count):
            old: Any = (self.keys, self.values)
            wanted, shapes = past + count, like or old
            most = max(wanted, self.max_tokens // max(1, shapes[0].shape[0]))
            length = min(most, wanted + max(MIN_ROOM, wanted // 4))
            keys, values = self._buffers(shapes, length)
            if past:
                keys[:, :, :past], values[:, :, :past] = old
            self._room, self._length, self._set = (keys, values), past, [None, None]
        return past, *self._room

    def _buffers(self, like: Any, length: int) -> Any:
        """Room for ``length`` tokens; of multi-head latent attention keys and values of a token are side by side.

        Zeros: the native step skips a batch's padding, which the family's own forward multiplies by 0.
        """
        dims, shape = [x.shape[3] for x in like], (*like[0].shape[:2], length)
        if dims[0] == dims[1]:
            return [torch.zeros(*shape, dims[0], dtype=self.dtype, device=self.device) for _ in like]
        both = torch.zeros(*shape, sum(dims), dtype=self.dtype, device=self.device)
        return both[..., : dims[0]], both[..., dims[0] :]

    @staticmethod
    def _is_apart(keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether they should be side by side, and are not."""
        dim = keys.shape[3]
        return dim != values.shape[3] and values.data_ptr() != keys.data_ptr() + dim * keys.element_size()

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What ``reserve`` gave, as long as nothing else was put in its place."""
        return self._room

    @property
    def batch(self) -> int:
        """Sequences; 0 where nothing is cached."""
        keys = self._set[0] if self._room is None else self._room[0]
        return keys.shape[0] if keys is not None and keys.dim() == 4 else 0

    def has_room(self, count: int) -> bool:
        """Whether the buffers have room for ``count`` more tokens, and may be written to."""
        if self._room is None or (self._room[0].is_inference() and not torch.is_inference_mode_enabled()):
            return False
        return self._room[0].shape[2] >= self._length + count and not self._is_apart(*self._room)

    def extend(self, count: int) -> None:
        """``count`` tokens were written to the reserved buffers behind the others."""
        self._length += count

    def has_gradients(self) -> bool:
        """Whether gradients are computed for cached keys or values."""
        return torch.is_grad_enabled() and any(states is not None and states.requires_grad for states in self._set)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Entry i becomes what entry ``beam_idx[i]`` is; the room stays."""
        if self._room is None:
            super().reorder_cache(beam_idx)
        else:
            index = beam_idx.to(self.device)
            self._room = self._room[0].index_select(0, index), self._room[1].index_select(0, index)

    def holds(self, batch: int, dtype: torch.dtype) -> bool:
        """Whether this is ``batch`` sequences', in ``dtype``, with something in it."""
        return self.is_initialized and self.dtype == dtype and self.batch == batch


class RoomySlidingLayer(RoomyLayer):
    """A RoomyLayer of attention with a sliding window. It keeps all tokens, so that they can be cropped at any time; masks and
    transformers' own attention see the last of them, as DynamicSlidingWindowLayer keeps. Plans count such layers as full ones."""

    is_sliding = True

    def __init__(self, max_tokens: int, sliding_window: int) -> None:
        super().__init__(max_tokens)
        self.sliding_window = sliding_window

    def activate_past_recording(self) -> None:
        """The past is here."""

    def get_max_length(self) -> int:
        return self.sliding_window

    def reset(self) -> None:
        super().reset()
        if self.keys is not None and self.values is not None:  # some versions of transformers leave zeros
            self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.get_seq_length()
        return min(past, self.sliding_window - 1) + query_length, max(past - self.sliding_window + 1, 0)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        seen = self.get_mask_sizes(key_states.shape[-2])[0]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[:, :, -seen:], values[:, :, -seen:]


def make_room(cache: Any, max_tokens: int, unless_given: bool = False) -> None:
    """Give the layers of a DynamicCache room, those that have kept every token; other caches stay as they are.

    ``unless_given``: layers that were given a limit before keep it.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RoomyLayer):
            layer.max_tokens = layer.max_tokens if unless_given and layer.max_tokens else max_tokens
        elif (roomy := _roomy(layer, max_tokens)) is not None:
            cache.layers[index] = roomy


def room_for(cache: Any, index: int, kv_heads: int, dims: tuple[int, int], batch: int = 1) -> RoomyLayer | None:
    """Layer ``index`` of ``cache`` with keys and values of ``batch`` sequences in bf16 (``dims`` of a head of each), made where
    nothing is cached yet.

    None if it is another kind, or somebody trains what is in it (prefix tuning)."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    layers = cache.layers
    if index == len(layers) and cache.layer_class_to_replicate is DynamicLayer:
        layers.append(RoomyLayer())
    if index >= len(layers):
        return None
    layer = layers[index]
    if not layer.is_initialized and (roomy := _roomy(layer, 0)) is not None:
        layer = layers[index] = roomy
    if not isinstance(layer, RoomyLayer) or layer.has_gradients():
        return None
    if not layer.is_initialized:
        nothing = [torch.empty(batch, kv_heads, 0, dim, dtype=torch.bfloat16) for dim in dims]
        layer.lazy_initialization(*nothing)
        layer.keys, layer.values = nothing
    return layer if layer.holds(batch, torch.bfloat16) else None


def _roomy(layer: Any, max_tokens: int) -> RoomyLayer | None:
    """``layer`` with room; None if it is of another kind, or has forgotten tokens."""
    if type(layer) is DynamicLayer:
        roomy = RoomyLayer(max_tokens)
    elif type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window:
        roomy = RoomySlidingLayer(max_tokens, layer.sliding_window)
    else:
        return None
    for name, value in vars(layer).items():
        setattr(roomy, name, value)
    return roomy


def whole_cache(config: Any, length: int) -> StaticCache:
    """A static cache whose layers have all of ``length`` tokens, those with a window too; masks say what these see."""
    cache = StaticCache(config=config, max_cache_len=length)
    cache.layers = [StaticLayer(max_cache_len=length) for _ in cache.layers]
    return cache
