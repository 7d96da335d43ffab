"""``generate()`` through the fused decode step: transformers' own loop, with its sampling, streamers and stopping rules, around one
replay a token.

The model keeps one static KV cache, of one sequence, that ``generate`` is given. A pass of one token over it is the fused step;
every other pass (a prompt, a batch, beams, another cache, a model with adapters or hooks) runs transformers' layers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from fate_moe.adapter.contract import is_experts
from fate_moe.adapter.kv_cache import whole_cache
from fate_moe.core import KV_BLOCK, Patcher
from fate_moe.engine.attach import refuse_longer
from fate_moe.errors import UnsupportedCallError
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.layers.cuda_path_step import PathStep
from fate_moe.layers.cuda_step import FusedStep
from fate_moe.layers.snapshot import ModuleSnapshot

__all__ = ["CapturedDecode"]


class CapturedDecode:
    """Makes ``model`` decode through a fused step; ``graph`` False runs its kernels one by one, which gives the same bits."""

    def __init__(
        self,
        model: Any,
        experts: DeviceExperts,
        length: int,
        bytes_per_token: int,
        graph: bool,
        patcher: Patcher,
        paths: bool = False,
    ) -> None:
        """``length``: tokens of KV cache, each of ``bytes_per_token``. ``paths``: experts come early by activation paths, not by
        routers. ``record`` comes next, ``note_model`` once the model is complete."""
        config = model.config
        self._model, self._experts, self._length = model, experts, length
        self._bytes_per_token = bytes_per_token
        length = -(-length // KV_BLOCK) * KV_BLOCK
        self._forward, self._generate, self._prepare = model.forward, model.generate, model.prepare_inputs_for_generation
        self.cache = whole_cache(config, length)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(1, config.num_key_value_heads, dim, model.dtype, model.device)
        self._step = (PathStep if paths else FusedStep)(model, experts, self.cache)
        self._graph = graph and model.device.type == "cuda" and length > 2
        self._recorded = [1]  # numbers of rows
        self._is_whole = True  # the step takes the cache for one sequence, and one row
        self._held = 0  # tokens in the cache
        self._lent = False  # the cache was given away with a result
        self._writing: bool | None = None  # whether the generate() that has the cache may take the step; None: none has it
        self.steps = 0
        self.uses = 0  # how often somebody began to write to the cache
        patcher.replace(model, "forward", _in_place_of(self._forward, self._pass))
        patcher.replace(model, "generate", _in_place_of(self._generate, self._write))
        patcher.replace(model, "prepare_inputs_for_generation", _in_place_of(self._prepare, self._inputs))

    def record(self) -> None:
        """Compile the step, record it with the experts' options of now, and empty the cache."""
        if self._graph:
            for rows in self._recorded:
                self._step.capture(rows)
        self.cache.reset()

    @property
    def most_rows(self) -> int:
        """How many rows one pass of ``read`` computes."""
        return self._step.most_rows

    def record_rows(self) -> None:
        """Record steps of several rows too, for ``read``; others compute them as they come."""
        if not self._is_whole:
            self._step.whole()
            self._is_whole = True
        more = [rows for rows in _powers(self.most_rows) if rows not in self._recorded]
        for rows in more if self._graph else []:
            self._step.capture(rows)
        self._recorded += more

    def note_model(self) -> None:
        """Remember the model as it is now, so that later changes are noticed. Comes after all changes of the engine's own."""
        self._snapshot = ModuleSnapshot([module for module in self._model.modules() if not is_experts(module)])

    def one_token(self) -> None:
        """A step of always the same token, for measurements; ``record`` afterwards."""
        self._step.begin(0, 0)
        self._run(1)

    def _run(self, rows: int) -> None:
        if self._graph:
            self._step.replay(rows)
        else:
            self._step.step(rows)

    def _write(self, inputs: torch.Tensor | None = None, *args: Any, **options: Any) -> Any:
        """``model.generate``: with our cache where it is one sequence without padding, nobody brings a cache.

        A call within such a call (a streamer's, a logits processor's) has another.
        """
        prompt = inputs if inputs is not None else options.get("input_ids")
        mask = options.get("attention_mask")
        own = options.get("past_key_values") is None and not args and self._writing is None
        if own and prompt is not None and prompt.shape[0] == 1 and (mask is None or bool(mask.all())) and self._alone(options):
            options.setdefault("disable_compile", True)
            with self.sequence() as options["past_key_values"]:
                result = self._generate(inputs, *args, **options)
            self._lent = getattr(result, "past_key_values", None) is self.cache
            return result
        return self._generate(inputs, *args, **options)

    @contextmanager
    def sequence(self) -> Iterator[StaticCache]:
        """The cache, empty: meanwhile passes over it may be the fused step. One such sequence at a time."""
        with self.blocks():
            self.cache.reset()
            self._held = 0
            yield self.cache
        self._tell_cache()
        if isinstance(self._step, PathStep):
            self._step.keep()

    @contextmanager
    def blocks(self) -> Iterator[None]:
        """The cache's memory, for one at a time; meanwhile ``read`` and ``layers`` may take it for blocks of any sequences. Those
        of whoever had it before are as they were left only while ``uses`` is."""
        self._take_back_cache()
        self.uses += 1
        self._writing = self.is_unchanged()
        try:
            yield
        finally:
            self._writing = None

    def check_unchanged(self) -> None:
        """Raises UnsupportedCallError where the model is not what the step was made from."""
        if not self.is_unchanged():
            raise UnsupportedCallError("the model was changed while it was served; serve it again")

    def layers(self, table: Sequence[int], past: int) -> list[StaticLayer]:
        """Layers of a cache in which a sequence has ``past`` tokens in the blocks ``table``, for a pass of transformers' layers."""
        places = torch.zeros(self.cache.layers[0].max_cache_len, dtype=torch.int64)
        within = torch.arange(KV_BLOCK)
        for number, block in enumerate(table):
            places[number * KV_BLOCK : (number + 1) * KV_BLOCK] = block * KV_BLOCK + within
        places = places.to(self._model.device)
        return [_BlockLayer(layer, places, past) for layer in self.cache.layers]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each (from, to)."""
        for old, new in copies:
            for layer in self.cache.layers:
                for states in (layer.keys, layer.values):
                    of = states[0].unflatten(1, (-1, KV_BLOCK))
                    of[:, new] = of[:, old]

    @torch.no_grad()
    def read(self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits fp32 [rows, vocabulary] of ``tokens``, each at its position of the sequence in its table's blocks. Rows of one
        sequence follow each other."""
        self._experts.state.host.check()  # closed, or broken
        made = []
        for first in range(0, len(tokens), self.most_rows):
            some = slice(first, first + self.most_rows)
            made.append(self._read(tokens[some], positions[some], tables[some]))
        self._experts.state.host.check()
        return made[0] if len(made) == 1 else torch.cat(made)

    def _read(self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]) -> torch.Tensor:
        step, count = self._step, len(tokens)
        rows = next(rows for rows in _powers(self.most_rows) if rows >= count)
        numbers = torch.zeros(2, count, dtype=torch.int64)
        numbers[0], numbers[1] = torch.tensor(tokens), torch.tensor(positions)
        longest = max(map(len, tables))
        places = torch.tensor([[*table, *[0] * (longest - len(table))] for table in tables], dtype=torch.int32)
        step.numbers[:, :count] = numbers.to(step.numbers.device)
        step.table[:count, :longest] = places.to(step.table.device)
        step.live.fill_(count)
        self._is_whole = False
        self._run(rows)
        self._experts.note_pass()
        self.steps += 1
        return step.all_logits[:count].clone()

    def _take_back_cache(self) -> None:
        """Before another sequence is written: whoever was given the cache with an earlier one finds that it is gone."""
        if self._lent:
            lent, self.cache, self._lent = self.cache, copy.copy(self.cache), False
            lent.layers = _Gone()

    def _tell_cache(self) -> None:
        """transformers' count of the tokens in the cache, which the fused step does not keep."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self._held)

    def _alone(self, options: dict[str, Any]) -> bool:
        """Whether ``options`` of generate() mean one sequence, one token after the other, in a cache of the usual kind."""
        config = options.get("generation_config") or self._model.generation_config
        several = any((_option(options, config, name) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
        kinds = ("cache_implementation", "prompt_lookup_num_tokens", "prefill_chunk_size")
        special = any(_option(options, config, name) is not None for name in kinds)
        plain = _option(options, config, "use_cache") is not False and options.get("inputs_embeds") is None
        return plain and not several and not special and options.get("assistant_model") is None

    def _may_step(self) -> bool:
        return self.is_unchanged() if self._writing is None else self._writing

    def is_unchanged(self) -> bool:
        """Whether the model is what the step was made from: no adapters, hooks or other settings. In generate() asked once."""
        return not self._snapshot.hooked() and self._snapshot.same()

    def _inputs(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """``prepare_inputs_for_generation``: the fused step wants no mask and no positions."""
        if kwargs.get("past_key_values") is self.cache and self._held and input_ids.shape[1] == self._held + 1:
            return {"input_ids": input_ids[:, -1:], "past_key_values": self.cache}
        return self._prepare(input_ids, *args, **kwargs)

    def _pass(self, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """``model.forward``."""
        self._experts.state.host.check()  # closed, or broken
        inputs = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        ours = kwargs.get("past_key_values") is self.cache and inputs is not None
        if inputs is not None:
            past = self._held if ours else _held_by(kwargs.get("past_key_values"))
            refuse_longer(inputs.shape[0] * (inputs.shape[1] + past), self._length, self._bytes_per_token)
        one = ours and self._held and input_ids is not None and input_ids.shape == (1, 1)
        if one and not args and not _wants_more(kwargs, self._model.config) and self._may_step():
            assert input_ids is not None
            return self._decode(input_ids)
        if ours:
            self._tell_cache()
        result = self._forward(input_ids, *args, **kwargs)
        if ours:
            self._held += inputs.shape[1]  # type: ignore[union-attr]
        return result

    def _decode(self, input_ids: torch.Tensor) -> Any:
        step = self._step
        if not self._is_whole:
            step.whole()
            self._is_whole = True
        step.token.copy_(input_ids[0])
        step.position.fill_(self._held)
        self._run(1)
        self._held += 1
        self.steps += 1
        logits = step.logits.clone().view(1, 1, -1)
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=self.cache)


class _BlockLayer(StaticLayer):  # type: ignore[misc]
    """``whole``, for one pass: a sequence of ``past`` tokens whose position p lies at ``places[p]``. Keys and values are given as
    such a layer of its own would give them, so that its bits are those of ``generate()``."""

    def __init__(self, whole: StaticLayer, places: torch.Tensor, past: int) -> None:
        super().__init__(max_cache_len=whole.max_cache_len)
        self.keys, self.values, self.dtype, self.device = whole.keys, whole.values, whole.dtype, whole.device
        self.is_initialized, self._places = True, places
        self.cumulative_length = torch.tensor(past, device=whole.device)
        self._past = past

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        count = key_states.shape[-2]
        here = self._places[self._past : self._past + count]
        self._past += count
        self.cumulative_length.add_(count)
        self.keys.index_copy_(2, here, key_states)
        self.values.index_copy_(2, here, value_states)
        return self.keys.index_select(2, self._places), self.values.index_select(2, self._places)


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [1 << bit for bit in range(most.bit_length())]


def _in_place_of(method: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` with the signature of ``method``, which transformers looks at."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return call


class _Gone:
    """The layers of a cache that another sequence has been written to since."""

    def __getattr__(self, name: str) -> Any:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    def __iter__(self) -> Iterator[Any]:
        self._refuse()

    def __getitem__(self, index: int) -> Any:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedCallError(
            "these past_key_values were given with an earlier result, and a later generate() uses their memory; pass a cache of "
            "your own (past_key_values=DynamicCache()) to go on with several sequences"
        )


def _held_by(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None else 0


def _wants_more(kwargs: dict[str, Any], config: Any) -> bool:
    """Whether a pass is asked for what the fused step does not give, or given what it does not read."""
    more = any(_option(kwargs, config, name) for name in ("output_hidden_states", "output_attentions", "output_router_logits"))
    given = any(kwargs.get(name) is not None for name in ("labels", "position_ids", "attention_mask", "inputs_embeds"))
    return more or given or _option(kwargs, config, "return_dict") is False


def _option(given: dict[str, Any], config: Any, name: str) -> Any:
    """What a call says of an option, else what ``config`` says."""
    value = given.get(name)
    return getattr(config, name, None) if value is None else value
