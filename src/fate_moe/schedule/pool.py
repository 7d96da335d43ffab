"""The executor of models that run whole in the extension: all rows of a step in one native pass, over one pool of KV blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from fate_moe.core import KV_BLOCK
from fate_moe.errors import UnsupportedCallError
from fate_moe.kernels.attention import dequantized, quantized
from fate_moe.layers.model_step import ModelStep, SequenceRows
from fate_moe.schedule.block_files import BlockFiles
from fate_moe.schedule.blocks import Blocks, OutOfBlocksError
from fate_moe.schedule.disk_prefixes import DiskPrefixes
from fate_moe.schedule.executor import Result, Rows, watched
from fate_moe.schedule.prefixes import Prefixes
from fate_moe.schedule.states import Mark, States

__all__ = ["PoolExecutor"]

_Marks = dict[int, list[tuple[Mark, int]]]  # by sequence, the entries that checkpoints are written to


class PoolExecutor:
    """``pool`` is the step's: keys and values of each decoder layer in blocks, or what sequences keep in a layer with a state, of
    which each has one entry. Memory is taken as blocks and entries are first used. There are as many entries as the plan's room for
    those layers' keys and values holds; what sequences do not need of them holds checkpoints (states.py).

    Where the extension takes few rows at once (weights that are not quantized), a longer prompt goes through the model's own
    forward, as in ``generate()``.
    """

    shares_passes = True

    def __init__(self, model: Any, step: ModelStep, num_blocks: int, most_kept: int | None = None) -> None:
        """``most_kept`` blocks may be kept of texts that ended (None: all)."""
        self.blocks = Blocks(num_blocks)
        self._model, self._step = model, step
        self.on_pass: Callable[[], None] = lambda: None
        self._has_begun = False  # whether a pass may have changed the pool
        self.any_cut = step.most_rows == sys.maxsize
        self.chunk: int | None = None
        self.takes_drafts = self.any_cut and not step.state_bytes  # a state cannot be taken back to where it was
        self.disk: DiskPrefixes | None = None
        self.kv_format: str = model.fate.config.kv_cache
        self.state_bytes = step.state_bytes
        self.most_sequences: int | None = None
        self.states: States | None = None
        if step.state_bytes:
            room = model.fate.plan.kv_cache_bytes * sum(of.delta is not None for of in step.attentions) // len(step.attentions)
            self.most_sequences = max(1, min(num_blocks, room // step.state_bytes))
            share = 1.0 if most_kept is None else most_kept / num_blocks
            self.states = States(self.most_sequences, int(share * self.most_sequences))
        keeps = self.any_cut and most_kept != 0
        self.prefixes = Prefixes(self.blocks, most=most_kept, states=self.states) if keeps else None
        self.pool = step.new_pool(num_blocks, self.most_sequences or 0)
        self.block_bytes = sum(of[0][0].nbytes for of in self.pool if len(of) == 1) if num_blocks else 0

    def keep_on_disk(self, home: Path, model: bytes, most_bytes: int) -> None:
        """Keep what is kept under ``home`` too. ``model``: the digest of what keys and values depend on."""
        if self.prefixes is None:
            return
        shapes = " ".join(f"{states.dtype} {tuple(states.shape[1:])}" for of in self.pool for states in of)
        form = f"{self.kv_format}-{xxhash.xxh3_64_hexdigest(shapes.encode())}"
        folder = blake2b(model + form.encode(), digest_size=16).hexdigest()  # blocks in another format have names of their own
        self.disk = DiskPrefixes(BlockFiles(home, folder, form, self.block_bytes, most_bytes), self.prefixes, self.memory)
        if self.states is not None:
            folder = blake2b(model + form.encode() + b" states", digest_size=16).hexdigest()
            files = BlockFiles(home, folder, f"states-{form}", self.state_bytes, most_bytes)
            self.disk.keep_states(files, self.state_memory)

    def memory(self, block: int) -> list[memoryview]:
        """The bytes of ``block`` in each layer that has some."""
        return [_bytes_of(of[0][block]) for of in self.pool if len(of) == 1]

    def state_memory(self, entry: int) -> list[memoryview]:
        """The bytes of ``entry`` in each layer with a state."""
        return [_bytes_of(states[entry]) for of in self.pool if len(of) == 2 for states in of]

    def new(self) -> int:
        return self._entered(self.blocks.new())

    def begin(self, tokens: Sequence[int]) -> tuple[int, int]:
        assert self.prefixes is not None
        sequence, read = self.prefixes.begin(tokens)
        return self._entered(sequence, self.prefixes.use_state(tokens, read)), read

    def fork(self, sequence: int) -> int:
        return self._entered(self.blocks.fork(sequence), self.states.entry(sequence) if self.states is not None else None)

    def drop(self, sequence: int) -> None:
        self.blocks.drop(sequence)
        if self.states is not None:
            self.states.leave(sequence)

    def _entered(self, sequence: int, source: int | None = None) -> int:
        """``sequence``, with what is in the entry ``source`` of layers with a state."""
        if self.states is None:
            return sequence
        try:
            entry = self.states.enter(sequence)  # it may be ``source`` itself, of a checkpoint that had to go
        except OutOfBlocksError:
            self.blocks.drop(sequence)
            raise
        if source is not None and source != entry:
            for states in (each for of in self.pool if len(of) == 2 for each in of):
                states[entry] = states[source]
        return sequence

    def cut(self, sequence: int, length: int) -> None:
        self.blocks.cut(sequence, length)

    def learn(self, kept: Sequence[int]) -> None:
        self._model.fate.learn(kept)

    def step(self, rows: Sequence[Rows]) -> list[Result]:
        for old, new in self.blocks.append_all([(one.sequence, len(one.tokens)) for one in rows]):
            for states in (of[0] for of in self.pool if len(of) == 1):
                states[new] = states[old]
        taken = {one.sequence: self.states.take(one.marks) for one in rows if one.marks and self.states is not None}
        results: dict[int, Result] = {}
        for several in self._passes(rows):
            results |= self._run(several, taken)
        for sequence, of in taken.items():
            assert self.states is not None
            self.states.put(of, written=isinstance(results[sequence], torch.Tensor))
        return [results[one.sequence] for one in rows]

    def _passes(self, rows: Sequence[Rows]) -> Iterator[list[Rows]]:
        """``rows`` as they go into passes."""
        taken, count = list[Rows](), 0
        for one in rows:
            if len(one.tokens) > self._step.most_rows:
                yield [one]
                continue
            if count + len(one.tokens) > self._step.most_rows:
                yield taken
                taken, count = [], 0
            taken.append(one)
            count += len(one.tokens)
        if taken:
            yield taken

    def _run(self, rows: list[Rows], marks: _Marks) -> dict[int, Result]:
        """One pass. Where it fails, each of ``rows`` gets another: one's error is not the others'. But states that a pass has begun
        to write cannot be gone on from."""
        self._has_begun = False
        try:
            if len(rows[0].tokens) > self._step.most_rows:
                return {rows[0].sequence: self._forward(rows[0])}
            return self._run_rows(rows, marks)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if len(rows) == 1 or (self._has_begun and self.states is not None):
                return dict.fromkeys((one.sequence for one in rows), error)
            return {one.sequence: self._run([one], marks)[one.sequence] for one in rows}

    def _run_rows(self, rows: list[Rows], marks: _Marks) -> dict[int, Result]:
        tokens, wanted, sequences = list[int](), list[int](), list[SequenceRows]()
        for one in rows:
            tokens += one.tokens
            wanted += range(len(tokens) - one.wanted, len(tokens))
            count = len(one.tokens)
            past, entry = self.blocks.length(one.sequence) - count, self._entry(one.sequence)
            places = [(mark.position, to) for mark, to in marks.get(one.sequence, ())]
            sequences.append(SequenceRows(count, past, self.blocks.table(one.sequence), entry, one.drafted, places))
        with torch.inference_mode():
            if not self._step.is_unchanged():
                raise UnsupportedCallError("the model was changed while it was served; serve it again")
            logits = self._model.fate.run_rows(tokens, sequences, self.pool, wanted, self._begin_pass)
        return dict(zip((one.sequence for one in rows), logits.split([one.wanted for one in rows]), strict=True))

    def _begin_pass(self) -> None:
        self._has_begun = True
        self.on_pass()

    def _entry(self, sequence: int) -> int:
        return self.states.entry(sequence) if self.states is not None else 0

    def _forward(self, rows: Rows) -> torch.Tensor:
        """A prompt, through the model's own forward."""
        if self.blocks.length(rows.sequence) != len(rows.tokens):
            raise UnsupportedCallError(f"this model reads {self._step.most_rows} tokens at once behind others")
        table, cache = torch.tensor(self.blocks.table(rows.sequence)), DynamicCache()
        entry = self._entry(rows.sequence)
        cache.layers = [_PoolState(*of, entry) if len(of) == 2 else _PoolLayer(of[0], table) for of in self.pool]
        with torch.inference_mode(), watched(self._model, rows.watch):
            inputs = torch.tensor([rows.tokens])
            self.on_pass()
            output = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=max(1, rows.wanted))
        return output.logits[0, output.logits.shape[1] - rows.wanted :]  # type: ignore[no-any-return]


def _bytes_of(states: torch.Tensor) -> memoryview:
    return memoryview(states.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class _PoolState(LinearAttentionLayer):  # type: ignore[misc]
    """A layer of a cache that a whole prompt is read into, once: into ``entry`` of ``inputs`` and ``states``."""

    def __init__(self, inputs: torch.Tensor, states: torch.Tensor, entry: int) -> None:
        super().__init__()
        self.conv_states[0], self.recurrent_states[0] = inputs[entry : entry + 1], states[entry : entry + 1]
        self.dtype, self.device, self.conv_kernel_size[0] = inputs.dtype, inputs.device, inputs.shape[-1]
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        for each in (self.conv_states[0], self.recurrent_states[0]):
            each.zero_()


class _PoolLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache that a whole prompt is written to, once: into the blocks ``table`` of ``states``."""

    def __init__(self, states: torch.Tensor, table: torch.Tensor) -> None:
        super().__init__()
        self._states, self._table = states, table

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """``key_states`` and ``value_states`` [1, kv_heads, tokens, dim]; of latent attention they are parts of one row."""
        dims = key_states.shape[3], value_states.shape[3]
        rows = [key_states[0], value_states[0]] if self._states.shape[1] == 2 else [torch.cat([key_states[0], value_states[0]], -1)]
        if coded := self._states.dtype == torch.uint8:
            rows = [quantized(each) for each in rows]
        whole, rest = divmod(key_states.shape[2], KV_BLOCK)
        for which, states in enumerate(rows):
            first = states[:, : whole * KV_BLOCK].reshape(len(states), whole, KV_BLOCK, -1).transpose(0, 1)
            self._states[self._table[:whole], which] = first
            if rest:
                self._states[self._table[whole], which, :, :rest] = states[:, whole * KV_BLOCK :]
        if not coded:
            return key_states, value_states
        read = [dequantized(each, sum(dims) if len(rows) == 1 else dims[0])[None] for each in rows]
        return (read[0], read[1]) if len(rows) == 2 else (read[0][..., : dims[0]], read[0][..., dims[0] :])
