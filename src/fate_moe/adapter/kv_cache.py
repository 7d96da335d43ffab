"""A KV cache with room to grow: a new token is written behind the others, which transformers' own copies every time. In bf16, or in
int8 (``kernels/attention.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer

from fate_moe.kernels.attention import dequantized, quantized, row_width

__all__ = ["Int8Layer", "RoomyLayer", "RoomySlidingLayer", "StateRoom", "make_room", "room_for", "state_for", "whole_cache"]

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
        return self._set[0] if self._room is None else self._states(0)

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._put(0, keys)

    @property
    def values(self) -> torch.Tensor | None:
        return self._set[1] if self._room is None else self._states(1)

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._put(1, values)

    def _filled(self, buffer: torch.Tensor) -> torch.Tensor:
        """The part that holds tokens, as a view without autograd's version counter.

        It is never written again, so a write behind it must not make autograd reject a view that it saved for backward.
        """
        return (buffer if buffer.is_inference() else buffer.data)[:, :, : self._length]

    def _states(self, which: int) -> torch.Tensor:
        """Keys or values that the buffers hold."""
        assert self._room is not None
        return self._filled(self._room[which])

    def _rows(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the buffers hold for ``keys`` and ``values``."""
        return keys, values

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
        for buffer, rows in zip(buffers, self._rows(key_states, value_states), strict=True):
            buffer[:, :, past : past + count] = rows
        self.extend(count)
        return self.keys, self.values

    def reserve(self, count: int, *like: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The number of tokens that are cached, and the buffers of keys and values with room for ``count`` more behind them.

        ``like``: new keys and values, for their shapes; may be left out where something is cached already.
        """
        past = self.get_seq_length()
        if self._room is None or not self.has_room(count):
            shapes: Any = like or (self.keys, self.values)
            wanted = past + count
            most = max(wanted, self.max_tokens // max(1, shapes[0].shape[0]))
            length = min(most, wanted + max(MIN_ROOM, wanted // 4))
            keys, values = self._buffers(shapes, length)
            if past:
                own: Any = self._set
                old = self._rows(*own) if self._room is None else [self._filled(buffer) for buffer in self._room]
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

    def _is_apart(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
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

    def take_back(self, count: int) -> None:
        """The last ``count`` tokens are gone; their room stays. What was returned of them may be written over."""
        if self._room is None:
            self.crop(-count)
        else:
            self._length -= count

    def has_gradients(self) -> bool:
        """Whether gradients are computed for cached keys or values."""
        return torch.is_grad_enabled() and any(states is not None and states.requires_grad for states in self._set)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Entry i becomes what entry ``beam_idx[i]`` is; the room stays."""
        if self._room is None:
            super().reorder_cache(beam_idx)
        else:
            index = beam_idx.to(self.device)
            self._each(lambda states: states.index_select(0, index))

    def _each(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put what ``act`` makes of each buffer in its place; one that serves keys and values stays one."""
        assert self._room is not None
        keys, values = self._room
        made = act(keys)
        self._room = made, made if values is keys else act(values)

    def holds(self, batch: int, dtype: torch.dtype) -> bool:
        """Whether this is ``batch`` sequences', in ``dtype``, with something in it."""
        return self.is_initialized and self.dtype == dtype and self.batch == batch


class Int8Layer(RoomyLayer):
    """A RoomyLayer whose buffers have rows in int8 (``quantized``). Its ``keys`` and ``values`` are copies in bf16, and what is put
    in their place is quantized; cropping and beams change the rows' places alone."""

    _dims = (0, 0)

    def _rows(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        if keys.shape[-1] == values.shape[-1]:
            return quantized(keys), quantized(values)
        return [quantized(torch.cat([keys, values], -1))] * 2

    def _states(self, which: int) -> torch.Tensor:
        assert self._room is not None
        dims = self._dims
        if dims[0] == dims[1]:
            return dequantized(self._filled(self._room[which]), dims[0]).to(self.dtype)
        both = dequantized(self._filled(self._room[0]), sum(dims)).to(self.dtype)
        return both[..., dims[0] :] if which else both[..., : dims[0]]

    def _buffers(self, like: Any, length: int) -> Any:
        self._dims = dims = (like[0].shape[3], like[1].shape[3])
        width = row_width("int8", dims[0] if dims[0] == dims[1] else sum(dims))
        shape = (*like[0].shape[:2], length, width)
        keys = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        return [keys, torch.zeros_like(keys) if dims[0] == dims[1] else keys]

    def _is_apart(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        if self._room is None:
            super().crop(tokens_to_remove)
        else:
            self._length = max(0, self._length - abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._room is None:
            super().batch_repeat_interleave(repeats)
        else:
            self._each(lambda states: states.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self._room is None:
            super().batch_select_indices(indices)
        else:
            self._each(lambda states: states[indices])


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


class _Int8SlidingLayer(RoomySlidingLayer, Int8Layer):
    pass


def make_room(cache: Any, max_tokens: int, unless_given: bool = False, kv_format: str = "bf16") -> None:
    """Give the layers of a DynamicCache room, those that have kept every token; other caches stay as they are.

    ``unless_given``: layers that were given a limit before keep it. Layers with room stay in their format.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RoomyLayer):
            layer.max_tokens = layer.max_tokens if unless_given and layer.max_tokens else max_tokens
        elif (roomy := _roomy(layer, max_tokens, kv_format)) is not None:
            cache.layers[index] = roomy


def room_for(
    cache: Any, index: int, kv_heads: int, dims: tuple[int, int], batch: int = 1, kv_format: str = "bf16"
) -> RoomyLayer | None:
    """Layer ``index`` of ``cache`` with keys and values of ``batch`` sequences of a bf16 model (``dims`` of a head of each), made
    in ``kv_format`` where nothing is cached yet.

    None if it is another kind, or somebody trains what is in it (prefix tuning)."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    layers = cache.layers
    if index == len(layers) and cache.layer_class_to_replicate is DynamicLayer:
        layers.append(RoomyLayer() if kv_format == "bf16" else Int8Layer())
    if index >= len(layers):
        return None
    layer = layers[index]
    if not layer.is_initialized and (roomy := _roomy(layer, 0, kv_format)) is not None:
        layer = layers[index] = roomy
    if not isinstance(layer, RoomyLayer) or layer.has_gradients():
        return None
    if not layer.is_initialized:
        nothing = [torch.empty(batch, kv_heads, 0, dim, dtype=torch.bfloat16) for dim in dims]
        layer.lazy_initialization(*nothing)
        layer.keys, layer.values = nothing
    return layer if layer.holds(batch, torch.bfloat16) else None


class StateRoom:
    """What a recurrent layer of a DynamicCache keeps of ``batch`` sequences, in transformers' own tensors."""

    def __init__(self, layer: Any, batch: int) -> None:
        self._layer, self.batch = layer, batch

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """Inputs of the convolution [batch, channels, kernel], the newest last, and states [batch, heads, key_dim, value_dim];
        nothing where every input is kept from now on."""
        return () if self._layer.record_past else (self._layer.conv_states[0], self._layer.recurrent_states[0])

    def get_seq_length(self) -> int:
        """1 if there is something; how many tokens it comes from is not kept."""
        return int(self._layer.has_previous_state[0])

    def reserve(self, count: int) -> tuple[Any, ...]:
        """As RoomyLayer's."""
        return self.get_seq_length(), *self.buffers

    def extend(self, count: int) -> None:
        """``count`` tokens went through."""
        self._layer.has_previous_state[0] = True


def state_for(cache: Any, index: int, shapes: tuple[tuple[int, ...], tuple[int, ...]], batch: int) -> StateRoom | None:
    """Layer ``index`` of ``cache`` as one that keeps a state of ``batch`` sequences (bf16 and fp32, of ``shapes``), made where
    nothing is cached yet. None if it is another kind, or keeps every input (assisted generation)."""
    linear = getattr(cache_utils, "LinearAttentionLayer", None)  # younger than the oldest transformers
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers) or linear is None:
        return None
    layer = cache.layers[index]
    if type(layer) is not linear or getattr(layer, "number_of_states", 0) != 1 or layer.record_past:
        return None
    if not layer.is_conv_states_initialized[0] and not layer.is_recurrent_states_initialized[0]:
        inputs, states = torch.zeros(batch, *shapes[0], dtype=torch.bfloat16), torch.zeros(batch, *shapes[1])
        layer.lazy_initialization(conv_states=inputs)
        layer.lazy_initialization(recurrent_states=states)
    found = layer.conv_states[0], layer.recurrent_states[0]
    for states, shape, dtype in zip(found, shapes, (torch.bfloat16, torch.float32), strict=True):
        if (
            states is None
            or states.shape != (batch, *shape)
            or states.dtype != dtype
            or not states.is_contiguous()
            or states.requires_grad
        ):
            return None
    return StateRoom(layer, batch)


def _roomy(layer: Any, max_tokens: int, kv_format: str) -> RoomyLayer | None:
    """``layer`` with room; None if it is of another kind, or has forgotten tokens."""
    bf16 = kv_format == "bf16"
    if type(layer) is DynamicLayer:
        roomy = RoomyLayer(max_tokens) if bf16 else Int8Layer(max_tokens)
    elif type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window:
        roomy = (RoomySlidingLayer if bf16 else _Int8SlidingLayer)(max_tokens, layer.sliding_window)
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
