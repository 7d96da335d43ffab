"""What computes a step: rows of several sequences in, logits out. ModelExecutor does so for every model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from transformers import GenerationConfig

from fate_moe.adapter.kv_cache import make_room
from fate_moe.core import KV_BLOCK
from fate_moe.engine.device_budget import DevicePlan
from fate_moe.layers.cpu_step import CpuStep
from fate_moe.schedule.blocks import Blocks
from fate_moe.schedule.disk_prefixes import DiskPrefixes
from fate_moe.schedule.prefixes import Prefixes
from fate_moe.schedule.sampling import prepared
from fate_moe.schedule.states import Mark

__all__ = ["Executor", "ModelExecutor", "Result", "Rows", "watched"]

# A row's result: logits [wanted, vocab] of its last positions, or why there are none.
Result: TypeAlias = "torch.Tensor | BaseException"


@dataclass(frozen=True)
class Rows:
    """``tokens`` (at least one) are read behind what ``sequence`` has; the logits of the last ``wanted`` of them are asked for. The
    last ``drafted`` may be taken back (``Executor.cut``).

    ``watch``: called now and then, where the executor can, with the share of the rows' work that is done; what it raises ends them.
    ``marks``: checkpoints to be made on the way, where ``prefixes`` has states and they find room.
    """

    sequence: int
    tokens: Sequence[int]
    wanted: int = 1
    watch: Callable[[float], None] | None = None
    drafted: int = 0
    marks: Sequence[Mark] = ()


class Executor(Protocol):
    """Holds sequences in ``blocks`` of the KV cache, of ``block_bytes`` each (or 0), and computes steps. Used from one thread.
    ``state_bytes``: of what a sequence keeps in layers that have a state.

    ``on_pass`` is called when a pass is about to leave the interpreter, as late as can be: for what others may do meanwhile.

    ``any_cut``: logits do not depend on how a sequence is cut into steps. Where they may, whoever asks for the same numbers reads a
    prompt in one step and what follows token by token. Where they do not, ``prefixes`` (None: the executor has none) keeps
    what ended for texts that begin alike, and ``disk`` (None: nobody) on the disk. Where they may and there is a ``chunk``, a
    multiple of KV_BLOCK, prompts are read in steps that end at the multiples of it, and ``prefixes`` keeps what was read in whole
    ones.

    ``takes_drafts``: rows of a sequence may be taken back, and have the bits of passes of their own. ``most_sequences`` may exist
    at once (None: as many as there are blocks);
    ``shares_passes``: rows of several sequences in one step take less time than one after the other.
    """

    blocks: Blocks
    prefixes: Prefixes | None
    disk: DiskPrefixes | None
    block_bytes: int
    state_bytes: int
    on_pass: Callable[[], None]
    any_cut: bool
    chunk: int | None
    takes_drafts: bool
    most_sequences: int | None
    shares_passes: bool

    def new(self) -> int:
        """The name of an empty sequence."""

    def begin(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The name of a sequence for ``tokens``, and how many of them it has already. Only where there are ``prefixes``."""

    def fork(self, sequence: int) -> int:
        """The name of a sequence that goes on from where ``sequence`` is."""

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""

    def cut(self, sequence: int, length: int) -> None:
        """Take back what ``sequence`` read behind its first ``length`` tokens. Only where ``takes_drafts``."""

    def learn(self, kept: Sequence[int]) -> None:
        """Of the drafts of each entry of the last step, the first ``kept`` are part of its text: the experts' memory may learn of
        them, and not of others. Only where ``takes_drafts``."""

    def step(self, rows: Sequence[Rows]) -> list[Result]:
        """Read ``rows``, at most one entry a sequence. An error of one entry stands in its place; its sequence can only be dropped.

        Raises OutOfBlocksError, before anything has changed, where ``blocks`` has too few for all of them.
        """


@dataclass
class _Own:
    """What the model is called with for one sequence, and the tokens that it has read."""

    kwargs: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    end: Callable[[], None] = lambda: None


class ModelExecutor:
    """Every model's: one forward pass for each sequence, with a cache of its own, as ``generate()`` would call it.

    A model on a GPU, whose captured step has one cache, takes one sequence.
    """

    shares_passes = takes_drafts = False
    block_bytes = state_bytes = 0

    def __init__(self, model: Any, num_blocks: int) -> None:
        self.blocks = Blocks(num_blocks)
        self.prefixes: Prefixes | None = None  # a sequence's cache is its own
        self.disk: DiskPrefixes | None = None
        self.any_cut = _reads_in_any_cut(model)
        self.chunk: int | None = None
        self.most_sequences = 1 if isinstance(model.fate.plan, DevicePlan) else None
        self._model, self._own = model, dict[int, _Own]()
        inputs = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.on_pass: Callable[[], None] = lambda: None
        self._prepared = prepared(model, inputs, GenerationConfig(max_new_tokens=1, pad_token_id=0, do_sample=False)).kwargs
        positions = self._prepared.pop("position_ids", None)
        self._has_positions = positions is not None and positions.dim() == 2

    def new(self) -> int:
        name, decode = self.blocks.new(), getattr(self._model.fate, "decode", None)
        if decode is None:
            self._own[name] = _Own(copy.deepcopy(self._prepared))
        else:
            stack = ExitStack()
            cache = stack.enter_context(decode.sequence())
            self._own[name] = _Own({**self._prepared, "past_key_values": cache}, end=stack.close)
        return name

    def begin(self, tokens: Sequence[int]) -> tuple[int, int]:
        raise NotImplementedError("there are no prefixes")

    def fork(self, sequence: int) -> int:
        name, own = self.blocks.fork(sequence), self._own[sequence]
        with torch.inference_mode():
            self._own[name] = _Own(copy.deepcopy(own.kwargs), list(own.tokens))
        return name

    def drop(self, sequence: int) -> None:
        self.blocks.drop(sequence)
        self._own.pop(sequence).end()

    def cut(self, sequence: int, length: int) -> None:
        raise NotImplementedError("takes_drafts is False")

    def learn(self, kept: Sequence[int]) -> None:
        raise NotImplementedError("takes_drafts is False")

    def step(self, rows: Sequence[Rows]) -> list[Result]:
        self.blocks.append_all([(one.sequence, len(one.tokens)) for one in rows])  # a sequence's cache is its own: nothing to copy
        return [self._read(one) for one in rows]

    def _read(self, rows: Rows) -> Result:
        own, count = self._own[rows.sequence], len(rows.tokens)
        past = len(own.tokens)
        own.tokens += rows.tokens
        model, kwargs = self._model, own.kwargs
        if self._has_positions:
            kwargs["position_ids"] = torch.arange(past, past + count, device=model.device)[None]
        kwargs["logits_to_keep"] = max(1, rows.wanted)  # 0 would be all
        room = len(self.blocks.table(rows.sequence)) * KV_BLOCK
        make_room(kwargs.get("past_key_values"), room, kv_format=model.fate.config.kv_cache)
        try:
            with torch.inference_mode(), watched(model, rows.watch):
                inputs = torch.tensor([own.tokens], device=model.device)
                call = model.prepare_inputs_for_generation(
                    inputs, next_sequence_length=count, is_first_iteration=past == 0, **kwargs
                )
                self.on_pass()
                output = model(**call, return_dict=True)
                kwargs.pop("position_ids", None)
                own.kwargs = model._update_model_kwargs_for_generation(output, kwargs)
                return output.logits[0, output.logits.shape[1] - rows.wanted :]  # type: ignore[no-any-return]
        except BaseException as error:  # a panic of a library in Rust is no Exception
            return error


def _decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The modules that a pass runs one after the other; empty where the model has no list of them."""
    layers = getattr(model.get_decoder(), "layers", None)
    return list(layers) if isinstance(layers, torch.nn.ModuleList) else []


def _reads_in_any_cut(model: Any) -> bool:
    """Whether all layers run whole by kernels for which one token and many are the same (docs/guarantees.md)."""
    layers = _decoder_layers(model)
    return bool(layers) and all(isinstance(layer.forward, CpuStep) and layer.forward.takes_many for layer in layers)


@contextmanager
def watched(model: Any, watch: Callable[[float], None] | None) -> Iterator[None]:
    """Meanwhile each decoder layer calls ``watch`` with the share of layers that have run."""
    if watch is None:
        yield
        return
    modules = _decoder_layers(model)

    def entering(share: float) -> Callable[..., None]:
        return lambda module, args: watch(share)

    handles = [layer.register_forward_pre_hook(entering(at / len(modules))) for at, layer in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
