"""A whole model in one call of the extension: all layers, the last norm and the head, for rows of one sequence or several.

Only where the code around the layers is known (``canonical.py``) and every layer is a ``CpuStep``. The model's own forward stays
for all other calls: hooks on parts, changed parts, recorded outputs, other caches and masks, training.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from fate_moe.kernels.native import native
from fate_moe.kernels.plain_layer import Norm
from fate_moe.layers.canonical import FIXED_ROPES, HEADS, ROPES, TRUNKS, meaning_of
from fate_moe.layers.cpu_step import CpuStep
from fate_moe.layers.modules import accelerated_by
from fate_moe.layers.rows import BLOCK, batch_rows, contiguous_kv, padding_of
from fate_moe.layers.snapshot import ModuleSnapshot, StandIn, Watch
from fate_moe.layers.weights import MOST_FEW, native_norm, takes_many, weight_of

__all__ = ["ModelStep", "SequenceRows", "model_step"]

_RECORDS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass(frozen=True)
class SequenceRows:
    """``count`` rows of a sequence that has ``past`` positions in its ``blocks``, which have room for past + count."""

    count: int
    past: int
    blocks: Sequence[int]


def model_step(model: Any, steps: Sequence[CpuStep]) -> ModelStep | None:
    """The whole of ``model`` as one step, if it can be one; ``steps`` are those of its layers that are."""
    trunk: Any = getattr(model, "model", None)
    if not steps or len(steps) != len(getattr(trunk, "layers", ())):
        return None
    if meaning_of(type(model), HEADS) is None or meaning_of(type(trunk), TRUNKS) is None:
        return None
    rope, head, norm = trunk.rotary_emb, model.lm_head, accelerated_by(trunk.norm)
    if meaning_of(type(rope), ROPES) is None or getattr(rope, "rope_type", "default") not in FIXED_ROPES:
        return None
    if not isinstance(norm, Norm) or getattr(head, "bias", None) is not None or weight_of(head) is None:
        return None
    return ModelStep(model, steps, norm)


class ModelStep(StandIn):
    """The model's forward: rows of sequences through everything in one call, else the model's own."""

    def __init__(self, model: Any, steps: Sequence[CpuStep], norm: Norm) -> None:
        self.original: Callable[..., Any] = model.forward
        self.__wrapped__ = model.forward  # transformers looks at the signature
        self._model, self._trunk, self._steps, self._shared = model, model.model, steps, steps[0].shared
        self._hidden, self._vocabulary = steps[0].hidden, int(model.lm_head.weight.shape[0])
        self._watch: Watch | None = None
        self._cached: tuple[Any, ...] = ()  # of the last pass: its cache, the layers' rooms, their buffers, and these as addresses
        self.most_rows = sys.maxsize if all(step.takes_many for step in steps) else MOST_FEW
        self._many_logits = takes_many([model.lm_head], self._shared.exact)
        self._windows = any(step.plain.attention.window for step in steps)
        self.head_dim = steps[0].plain.attention.head_dim
        self._angles = _Angles(self._trunk.rotary_emb)
        head = native.Head.make(native_norm(self._trunk.norm, norm), weight_of(model.lm_head))
        self.of = native.Step.make([step.of for step in steps], head)

    @property
    def kv_shapes(self) -> list[tuple[int, int]]:
        """(heads, dim) of keys and values, by decoder layer."""
        return [(step.plain.attention.kv_heads, step.plain.attention.head_dim) for step in self._steps]

    def note(self) -> None:
        """The model is complete: what changes from now on is somebody else's change."""
        around = ModuleSnapshot([self._model, self._trunk, self._trunk.layers])
        self._watch = Watch([around, *(step.snapshot for step in self._steps)])

    def is_unchanged(self) -> bool:
        """Whether the model is as it was found, and nobody watches a part of it."""
        return (
            self._watch is not None
            and self._watch.same()
            and self._angles.same()
            and all(step.experts is None or step.experts.__dict__["fate_runtime"] is self._shared.runtime for step in self._steps)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(*args, **kwargs)
        return out if out is not None else self.original(*args, **kwargs)

    def _forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> MoeCausalLMOutputWithPast | None:
        """As transformers has it; None where this is a call for the model's own forward."""
        config, cache = self._model.config, past_key_values
        use_cache = config.use_cache if use_cache is None else use_cache
        if (
            input_ids is None
            or inputs_embeds is not None
            or labels is not None
            or output_router_logits
            or return_dict is False
            or not isinstance(logits_to_keep, int)
            or isinstance(attention_mask, dict)
            or (attention_mask is not None and attention_mask.dim() != 2 and self._windows)
            or (cache is not None and not use_cache)
            or any(value not in (None, False) for value in others.values())
            or any(getattr(config, name, False) for name in _RECORDS)
            or not config.return_dict
            or input_ids.dim() != 2
            or not input_ids.numel()
            or input_ids.numel() > self.most_rows
            or not self.is_unchanged()
        ):
            return None
        batch, count = input_ids.shape
        if cache is None and use_cache:
            cache = DynamicCache(config=config)
        rooms = self._rooms(cache, batch) if cache is not None else []
        if rooms is None:
            return None
        past = rooms[0].get_seq_length() if rooms else 0
        padding = padding_of(attention_mask, batch, count, past)
        rows = batch_rows(batch, count, past, padding) if padding is not None else None
        if rows is None or (position_ids is not None and position_ids.shape[-1] != count):
            return None
        if rooms:
            kv = self._reserve(cache, rooms, count)
        else:
            forgotten = [self._new_kv(step, batch, count) for step in self._steps]
            kv = [number for states in forgotten for number in contiguous_kv(*states)]
        if position_ids is None:
            position_ids = torch.arange(past, past + count)[None]
        x = self._trunk.embed_tokens(input_ids if not rows.is_padded else input_ids.reshape(1, -1)[:, rows.index])
        positions = rows.pick(position_ids[..., None])[:, 0]
        wanted = rows.last_rows(logits_to_keep or count)
        logits = self._run(x.reshape(rows.num_rows, self._hidden), rows.spans, positions, kv, wanted)
        for room in rooms:
            room.extend(count)
        return MoeCausalLMOutputWithPast(
            logits=rows.put_last(logits, logits_to_keep or count),
            past_key_values=cache,
        )

    def _rooms(self, cache: Any, batch: int) -> list[Any] | None:
        """The layers of ``cache``; None if one is of another kind."""
        if self._cached and self._cached[0]() is cache and cache.layers == self._cached[1]:
            rooms: list[Any] = self._cached[1]
            if (
                all(room.buffers is buffers for room, buffers in zip(rooms, self._cached[2], strict=True))
                and rooms[0].batch == batch
            ):
                return rooms
        self._cached = ()
        rooms = [step.room_in(cache, batch) for step in self._steps]
        return None if None in rooms or len({room.get_seq_length() for room in rooms}) > 1 else rooms

    def _reserve(self, cache: Any, rooms: list[Any], count: int) -> list[int]:
        """The extension's Kv of all ``rooms``, with room for ``count`` more."""
        if not self._cached or not rooms[0].has_room(count):
            states = [room.reserve(count)[1:] for room in rooms]
            kv = [number for of in states for number in contiguous_kv(*of)]
            self._cached = weakref.ref(cache), rooms, [room.buffers for room in rooms], kv
        return self._cached[3]  # type: ignore[no-any-return]

    @torch.no_grad()
    def run_rows(
        self, tokens: Sequence[int], sequences: Sequence[SequenceRows], pool: Sequence[torch.Tensor], wanted: Sequence[int]
    ) -> torch.Tensor:
        """Logits bf16 [len(wanted), vocabulary] of the rows ``wanted`` (ascending) among ``tokens``, which are ``most_rows`` at
        most, those of ``sequences`` one after the other.

        ``pool`` has the blocks of each decoder layer's KV cache, bf16 [num_blocks, 2, kv_heads, 64, dim]; a sequence's block ids
        are the same in all layers, and positions are counted from 0. The rows' keys and values are written behind its ``past``.
        A row's logits depend on its own sequence alone, bit for bit. Called in a turn of the engine (``CpuEngine.run_rows``).
        """
        positions = torch.cat([torch.arange(one.past, one.past + one.count) for one in sequences])
        nothing = [0] * len(sequences)
        spans = native.Spans.make(
            [one.count for one in sequences],
            [one.past for one in sequences],
            nothing,
            nothing,
            [list(one.blocks) for one in sequences],
        )
        kv = [number for states in pool for number in _pooled_kv(states)]
        x = self._trunk.embed_tokens(torch.tensor([list(tokens)]))
        return self._run(x.reshape(len(tokens), self._hidden), spans, positions, kv, list(wanted))

    def _run(self, x: torch.Tensor, spans: Any, positions: torch.Tensor, kv: list[int], wanted: list[int]) -> torch.Tensor:
        """Logits of the ``wanted`` rows of ``x`` bf16 [num_rows, hidden]."""
        x, shared = x.clone(memory_format=torch.contiguous_format), self._shared
        native_head = self._many_logits or len(wanted) <= MOST_FEW
        logits = torch.empty(len(wanted), self._vocabulary, dtype=torch.bfloat16)
        shared.run(
            self.of,
            x.data_ptr(),
            spans,
            self._angles.at(positions),
            kv,
            wanted if native_head else [],
            logits.data_ptr(),
        )
        if native_head:
            return logits
        head: torch.Tensor = self._model.lm_head(self._trunk.norm(x[torch.tensor(wanted)]))
        return head

    def _new_kv(self, step: CpuStep, batch: int, count: int) -> torch.Tensor:
        attention = step.plain.attention
        return torch.empty(2, batch, attention.kv_heads, count, attention.head_dim, dtype=torch.bfloat16)


def _pooled_kv(states: torch.Tensor) -> tuple[int, int, int, int, int]:
    _, _, heads, positions, dim = states.shape
    assert positions == BLOCK
    assert states.dtype == torch.bfloat16
    assert states.is_contiguous()
    keys, size = states.data_ptr(), heads * BLOCK * dim
    return keys, keys + 2 * size, 0, 2 * size, BLOCK * dim


class _Angles:
    """cos and sin of positions fp32 [n, num_angles], from a table that the model's own module makes."""

    def __init__(self, rope: Any) -> None:
        self._rope, self._frequencies, self._scaling = rope, rope.inv_freq, rope.attention_scaling
        self._table = (torch.empty(0, 0), torch.empty(0, 0))

    def same(self) -> bool:
        """Whether the module is as it was found."""
        return self._rope.inv_freq is self._frequencies and self._rope.attention_scaling == self._scaling

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``positions`` int64 [n]."""
        last = int(positions[-1]) if len(positions) == 1 else int(positions.max())
        if last >= len(self._table[0]):
            every = torch.arange(max(256, last + last // 2))[None]
            cos, sin = self._rope(torch.empty(0, dtype=torch.bfloat16), every)
            self._table = cos[0].float().contiguous(), sin[0].float().contiguous()
        if len(positions) == 1:
            return self._table[0][last], self._table[1][last]
        return self._table[0][positions], self._table[1][positions]
