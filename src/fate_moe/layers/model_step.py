"""A whole model in one call of the extension: all layers, the last norm and the head, for rows of one sequence or several.

Only where the code around the layers is known (``canonical.py``) and every layer is a ``CpuStep``. The model's own forward stays
for all other calls: hooks on parts, changed parts, recorded outputs, other caches and masks, training.
"""

from __future__ import annotations

import math
import operator
import sys
import weakref
from bisect import bisect_left
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from fate_moe.adapter.kv_cache import StateRoom
from fate_moe.errors import BudgetError
from fate_moe.kernels.attention import row_width
from fate_moe.kernels.cpu import SMALL
from fate_moe.kernels.native import native
from fate_moe.kernels.plain_layer import Attention, Norm, PlainLayer
from fate_moe.layers.angles import angle_reasons, angles_of
from fate_moe.layers.attentions import projections_of
from fate_moe.layers.canonical import HEADS, TRUNKS, HeadCode, TrunkCode, meaning_of
from fate_moe.layers.cpu_step import CpuStep, state_shapes
from fate_moe.layers.modules import accelerated_by, matrices_of
from fate_moe.layers.plain import NotPlain, plain_decoder
from fate_moe.layers.reasons import cpu_reasons
from fate_moe.layers.rows import BLOCK, batch_rows, padding_of, state_kv
from fate_moe.layers.snapshot import ModuleSnapshot, StandIn, Watch
from fate_moe.layers.weights import MOST_FEW, native_norm, takes_many, weight_of

__all__ = ["ROWS_AT_ONCE", "ModelStep", "Pool", "SequenceRows", "around_reasons", "model_step", "prefixes_kept", "reads_in_pieces"]

# Of one decoder layer: keys and values in blocks, or the inputs and states that sequences keep.
Pool: TypeAlias = "tuple[torch.Tensor, ...]"
# Rows of one native call: what it keeps of a layer's rows bounds a prompt's memory, and on_read and Ctrl-C wait for no more.
ROWS_AT_ONCE = 512
_RECORDS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass(frozen=True)
class SequenceRows:
    """``count`` rows of a sequence that has ``past`` positions in its ``blocks``, which have room for past + count. ``state`` is
    its entry in the pool of layers that keep a state. The last ``drafted`` rows may turn out to be no part of its text. ``marks``
    are (position, entry), ascending: the state of that place goes there too."""

    count: int
    past: int
    blocks: Sequence[int]
    state: int = 0
    drafted: int = 0
    marks: Sequence[tuple[int, int]] = ()


def model_step(model: Any, steps: Sequence[CpuStep]) -> ModelStep | None:
    """The whole of ``model`` as one step, if it can be one; ``steps`` are those of its layers that are."""
    trunk: Any = getattr(model, "model", None)
    if not steps or len(steps) != len(getattr(trunk, "layers", ())) or around_reasons(model):
        return None
    codes, norm = (meaning_of(type(model), HEADS), meaning_of(type(trunk), TRUNKS)), accelerated_by(trunk.norm)
    if not isinstance(norm, Norm) or weight_of(model.lm_head) is None:
        return None
    return ModelStep(model, steps, norm, *codes)  # type: ignore[arg-type]


def around_reasons(model: Any) -> list[str]:
    """Why what is around the layers of ``model`` (which may have no weights) cannot be run with them; none if it can."""
    trunk = getattr(model, "model", None)
    if meaning_of(type(model), HEADS) is None:
        return [f"{type(model).__name__} makes logits in a way that is not known"]
    if trunk is None or meaning_of(type(trunk), TRUNKS) is None:
        return [f"{type(trunk).__name__} runs its layers in a way that is not known"]
    reasons = angle_reasons(trunk)
    if getattr(model.lm_head, "bias", None) is not None:
        reasons.append("its head has a bias")
    return reasons


def prefixes_kept(model: Any) -> str:
    """What servers and chats keep of texts of ``model`` (which may have no weights) that runs whole, in words."""
    attentions = [plain.attention for plain in plain_decoder(model) if isinstance(plain, PlainLayer)]
    parts = [
        ("latent rows" if any(of.latent for of in attentions) else "keys and values", lambda of: of.delta is None),
        ("windows too", lambda of: of.window),
        ("checkpoints of states", lambda of: of.delta is not None),
    ]
    return ", ".join(words for words, has in parts if any(map(has, attentions)))


def reads_in_pieces(model: Any, quantized: Container[str]) -> bool:
    """Whether prompts of ``model``, which may have no weights, will go through a ModelStep ``ROWS_AT_ONCE`` rows at a time, if its
    experts' kernels take many rows: all of it is known, and its large matrices (names of parameters) are ``quantized``."""
    layers, names = plain_decoder(model), {module: name for name, module in model.named_modules()}
    if not layers or around_reasons(model):
        return False
    for plain in layers:
        if isinstance(plain, NotPlain) or cpu_reasons(plain, model.dtype):
            return False
        layer = model.get_submodule(plain.path)
        parts = projections_of(layer.get_submodule(plain.attention_name))
        if plain.shared is not None:
            owner = layer if plain.shared.of_layer else layer.get_submodule(plain.block)
            parts += matrices_of(owner.get_submodule(plain.shared.name))
        if any(part.weight.numel() > SMALL and f"{names[part]}.weight" not in quantized for part in parts):
            return False
    return True


class ModelStep(StandIn):
    """The model's forward: rows of sequences through everything, ``ROWS_AT_ONCE`` in a call, else the model's own.

    Other calls may have ``most_whole`` rows: memory is set aside for so many. ``on_read`` is told how many rows of a pass are
    done, and of how many, after each call but the last; what it raises ends the pass.
    """

    def __init__(self, model: Any, steps: Sequence[CpuStep], norm: Norm, head_code: HeadCode, trunk_code: TrunkCode) -> None:
        self.original: Callable[..., Any] = model.forward
        self.__wrapped__ = model.forward  # transformers looks at the signature
        self._model, self._trunk, self._steps, self._shared = model, model.model, steps, steps[0].shared
        self._hidden, self._vocabulary = steps[0].hidden, int(model.lm_head.weight.shape[0])
        self._watch: Watch | None = None
        self._cached: tuple[Any, ...] = ()  # of the last pass: its cache, the layers' rooms, their buffers, and these as addresses
        self.most_rows = sys.maxsize if all(step.takes_many for step in steps) else MOST_FEW
        self._many_logits = takes_many([model.lm_head], self._shared.exact)
        self._windows = any(step.plain.attention.window for step in steps)
        self._multiplier = float(getattr(self._trunk, trunk_code.embedding)) if trunk_code.embedding else 1.0
        self._counting = next((i for i, step in enumerate(steps) if step.plain.attention.delta is None), 0)
        self._divisor = float(getattr(model.config, head_code.divisor)) if head_code.divisor else 1.0
        self.on_read: Callable[[int, int], None] | None = None
        self._coming: list[tuple[int, int]] = []  # by sequence, rows and drafts among them: of the next pass, if it has drafts
        self._read: list[tuple[int, int]] = []  # and of the last one
        self.most_whole = sys.maxsize
        self._angles, kinds = angles_of(self._trunk, [step.index for step in steps])
        head = native.Head.make(native_norm(self._trunk.norm, norm), weight_of(model.lm_head))
        self.of = native.Step.make([step.step_layer(kind) for step, kind in zip(steps, kinds, strict=True)], head)

    @property
    def attentions(self) -> list[Attention]:
        """By decoder layer."""
        return [step.plain.attention for step in self._steps]

    def new_pool(self, num_blocks: int, num_states: int) -> list[Pool]:
        """For ``run_rows``: by decoder layer the keys and values of ``num_blocks`` blocks [num_blocks, 2, kv_heads, 64, row], or
        latent rows and 1 for the 2, or what ``num_states`` sequences keep. A row is bf16 numbers, or uint8 as
        ``kernels.attention.quantized`` gives it. Memory is taken as it is first used."""
        made, kv_format = list[Pool](), self._shared.kv_format
        for of in self.attentions:
            if of.delta is None:
                shape = num_blocks, 1 if of.latent else 2, of.kv_heads, BLOCK, row_width(kv_format, of.head_dim)
                made.append((torch.empty(shape, dtype=torch.bfloat16 if kv_format == "bf16" else torch.uint8),))
            else:
                inputs, states = state_shapes(of.delta)
                made.append((torch.empty(num_states, *inputs, dtype=torch.bfloat16), torch.empty(num_states, *states)))
        return made

    @property
    def state_bytes(self) -> int:
        """Of all that one sequence keeps beside keys and values."""
        shapes = [state_shapes(of.delta) for of in self.attentions if of.delta is not None]
        return sum(2 * math.prod(inputs) + 4 * math.prod(states) for inputs, states in shapes)

    def note(self) -> None:
        """The model is complete: what changes from now on is somebody else's change."""
        around = ModuleSnapshot([self._model, self._trunk, self._trunk.layers])
        self._watch = Watch([around, *(step.snapshot for step in self._steps)])

    def is_unchanged(self) -> bool:
        """Whether the model is as it was found, and nobody watches a part of it."""
        return (
            self._watch is not None
            and self._watch.same()
            and all(angles.same() for angles in self._angles)
            and all(step.experts is None or step.experts.__dict__["fate_runtime"] is self._shared.runtime for step in self._steps)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(*args, **kwargs)
        if out is not None:
            return out
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None and ids.numel() > self.most_whole:
            raise BudgetError(
                f"{ids.numel()} tokens in a call for the model's own forward (hooks, recorded outputs, changed parts), and memory "
                f"is set aside for {self.most_whole}; give fewer at a time",
                0,
            )
        return self.original(*args, **kwargs)

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
        past = rooms[self._counting].get_seq_length() if rooms else 0
        padding = padding_of(attention_mask, batch, count, past)
        rows = batch_rows(batch, count, past, padding) if padding is not None else None
        if rows is None or (position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[-1] != count)):
            return None
        if rooms:
            kv = self._reserve(cache, rooms, count)
        else:
            forgotten = [step.forgotten(batch, count) for step in self._steps]
            kv = [number for step, states in zip(self._steps, forgotten, strict=True) for number in step.kv_of(*states)]
        if position_ids is None:
            position_ids = torch.arange(past, past + count)[None]
        ids = input_ids.reshape(-1)[rows.index] if rows.is_padded else input_ids.reshape(-1)
        positions = rows.pick(position_ids[..., None])[:, 0]
        wanted = rows.last_rows(logits_to_keep or count)
        logits = list[torch.Tensor]()
        for begin, end, spans in rows.pieces(ROWS_AT_ONCE):
            some = wanted[bisect_left(wanted, begin) : bisect_left(wanted, end)]
            x = self._embedded(ids[None, begin:end])[0]
            logits.append(self._run(x, spans, positions[begin:end], kv, [row - begin for row in some]))
            if end < rows.num_rows and self.on_read is not None:
                self.on_read(end, rows.num_rows)
        for room in rooms:
            room.extend(count)
        return MoeCausalLMOutputWithPast(
            logits=rows.put_last(torch.cat(logits) if len(logits) > 1 else logits[0], logits_to_keep or count),
            past_key_values=cache,
        )

    def _rooms(self, cache: Any, batch: int) -> list[Any] | None:
        """The layers of ``cache``; None if one is of another kind."""
        if self._cached and self._cached[0]() is cache and cache.layers == self._cached[4]:
            rooms: list[Any] = self._cached[1]
            now, then = _held(rooms), self._cached[2]
            if rooms[0].batch == batch and len(now) == len(then) and all(map(operator.is_, now, then)):
                return rooms
        self._cached = ()
        rooms = [step.room_in(cache, batch) for step in self._steps]
        if None in rooms:
            return None
        lengths = {room.get_seq_length() for room in rooms if not isinstance(room, StateRoom)}
        started = {bool(room.get_seq_length()) for room in rooms}
        return rooms if len(lengths) == 1 and len(started) == 1 else None

    def _reserve(self, cache: Any, rooms: list[Any], count: int) -> list[int]:
        """The extension's Kv of all ``rooms``, with room for ``count`` more."""
        if not self._cached or not rooms[self._counting].has_room(count):
            states = [room.reserve(count)[1:] for room in rooms]
            kv = [number for step, of in zip(self._steps, states, strict=True) for number in step.kv_of(*of)]
            self._cached = weakref.ref(cache), rooms, _held(rooms), kv, list(cache.layers)
        return self._cached[3]  # type: ignore[no-any-return]

    @torch.no_grad()
    def run_rows(
        self,
        tokens: Sequence[int],
        sequences: Sequence[SequenceRows],
        pool: Sequence[Pool],
        wanted: Sequence[int],
        on_pass: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Logits bf16 [len(wanted), vocabulary] of the rows ``wanted`` (ascending) among ``tokens``, which are ``most_rows`` at
        most, those of ``sequences`` one after the other.

        ``pool`` is as ``new_pool`` makes it; a sequence's block ids are the same in all layers, and positions are counted from 0.
        The rows' keys and values are written behind its ``past``; what a sequence without a past keeps is not read.
        A row's logits depend on its own sequence alone, bit for bit. Called in a turn of the engine (``CpuEngine.run_rows``).
        ``on_pass`` is called when the interpreter is about to be let go.
        """
        positions = torch.tensor([place for one in sequences for place in range(one.past, one.past + one.count)])
        spans = native.Spans.make(
            [one.count for one in sequences],
            [one.past for one in sequences],
            [one.state for one in sequences],
            [0] * len(sequences),
            [list(one.blocks) for one in sequences],
            [list(one.marks) for one in sequences] if any(one.marks for one in sequences) else [],
        )
        kv = [number for states in pool for number in (state_kv(*states) if len(states) == 2 else _pooled_kv(*states))]
        self.has_drafts([(one.count, one.drafted) for one in sequences])
        x = self._embedded(torch.tensor([list(tokens)]))
        return self._run(x.reshape(len(tokens), self._hidden), spans, positions, kv, list(wanted), on_pass)

    def _run(
        self,
        x: torch.Tensor,
        spans: Any,
        positions: torch.Tensor,
        kv: list[int],
        wanted: list[int],
        on_pass: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Logits of the ``wanted`` rows of ``x`` bf16 [num_rows, hidden]."""
        x, shared = x.clone(memory_format=torch.contiguous_format), self._shared
        native_head = self._many_logits or len(wanted) <= MOST_FEW
        logits = torch.empty(len(wanted), self._vocabulary, dtype=torch.bfloat16)
        tables = [table for angles in self._angles for table in angles.at(positions)]
        read, self._coming = self._coming, []
        self._read = read = read if sum(count for count, _ in read) == len(x) else []
        on_pass()
        shared.run(
            self.of,
            x.data_ptr(),
            spans,
            tables,
            kv,
            wanted if native_head else [],
            logits.data_ptr(),
            [depth for count, drafted in read for depth in _depths(count, drafted)],
        )
        if not native_head:
            logits = self._model.lm_head(self._trunk.norm(x[torch.tensor(wanted)]))
        return logits if self._divisor == 1.0 else logits / self._divisor

    def has_drafts(self, counts: Sequence[tuple[int, int]]) -> None:
        """Of the next pass's rows, by sequence how many there are and how many of them, the last ones, are drafts.

        What these choose teaches the experts' memory nothing (csrc/expert_memory.h) until ``learn``.
        """
        self._coming = list(counts) if any(drafted for _, drafted in counts) else []

    def learn(self, kept: Sequence[int]) -> None:
        """Of the drafts of the last pass, the first ``kept`` of each sequence are part of its text. In a turn of the engine."""
        read, self._read = self._read, []
        if read:
            self._shared.runtime.memory.learn(
                [0 < depth <= most for (count, drafted), most in zip(read, kept, strict=True) for depth in _depths(count, drafted)]
            )

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """bf16 [..., hidden]."""
        x: torch.Tensor = self._trunk.embed_tokens(tokens)
        return x if self._multiplier == 1.0 else x * self._multiplier


def _depths(count: int, drafted: int) -> list[int]:
    """Of a sequence's rows, how far each is behind the last token of its text: 0 for what is no draft."""
    return [max(0, row + 1 - count + drafted) for row in range(count)]


def _held(rooms: Sequence[Any]) -> list[torch.Tensor]:
    """Their buffers."""
    return [of for room in rooms for of in room.buffers or ()]


def _pooled_kv(states: torch.Tensor) -> tuple[int, ...]:
    """``states`` [num_blocks, 1 or 2, kv_heads, 64, row]: bf16, or uint8 as an int8 cache has it."""
    _, parts, heads, positions, row = states.shape
    assert positions == BLOCK
    assert states.is_contiguous()
    keys, size = states.data_ptr(), heads * BLOCK * row
    values = keys + (parts - 1) * size * states.itemsize
    return keys, values, 0, parts * size, BLOCK * row, int(states.dtype == torch.uint8)
