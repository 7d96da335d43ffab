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

__all__ = ["PoolExecutor"]


class PoolExecutor:
    """``pool`` is the step's: keys and values of each decoder layer in blocks, or what sequences keep in a layer with a state, of
    which each has one entry. Memory is taken as blocks and entries are first used. A state is that of the last token, so no prefix
    is kept of models with such layers, and as many sequences may exist as the plan's room for those layers' keys and values holds.

    Where the extension takes few rows at once (weights that are not quantized), a longer prompt goes through the model's own
    forward, as in ``generate()``.
    """

    shares_passes = True

    def __init__(self, model: Any, step: ModelStep, num_blocks: int, most_kept: int | None = None) -> None:
        """``most_kept`` blocks may be kept of texts that ended (None: all)."""
        self.blocks = Blocks(num_blocks)
        self._model, self._step = model, step
        self.on_pass: Callable[[], None] = lambda: None
        self.any_cut = step.most_rows == sys.maxsize
        self.chunk: int | None = None
        self.takes_drafts = self.any_cut and not step.state_bytes  # a state cannot be taken back to where it was
        keeps = self.any_cut and most_kept != 0 and not step.state_bytes
        self.prefixes = Prefixes(self.blocks, most=most_kept) if keeps else None
        self.disk: DiskPrefixes | None = None
        self.kv_format: str = model.fate.config.kv_cache
        self.most_sequences: int | None = None
        if step.state_bytes:
            room = model.fate.plan.kv_cache_bytes * sum(of.delta is not None for of in step.attentions) // len(step.attentions)
            self.most_sequences = max(1, min(num_blocks, room // step.state_bytes))
        self.pool = step.new_pool(num_blocks, self.most_sequences or 0)
        self._entries = dict[int, int]()  # by sequence
        self._free = list(range(self.most_sequences or 0))[::-1]
        self.block_bytes = sum(of[0][0].nbytes for of in self.pool if len(of) == 1) if num_blocks else 0

    def keep_on_disk(self, home: Path, model: bytes, most_bytes: int) -> None:
        """Keep what is kept under ``home`` too. ``model``: the digest of what keys and values depend on."""
        if self.prefixes is None:
            return
        shapes = " ".join(f"{states.dtype} {tuple(states.shape[1:])}" for of in self.pool for states in of)
        form = f"{self.kv_format}-{xxhash.xxh3_64_hexdigest(shapes.encode())}"
        folder = blake2b(model + form.encode(), digest_size=16).hexdigest()  # blocks in another format have names of their own
        self.disk = DiskPrefixes(BlockFiles(home, folder, form, self.block_bytes, most_bytes), self.prefixes, self.memory)

    def memory(self, block: int) -> list[memoryview]:
        """The bytes of ``block`` in each layer; only where no layer keeps a state."""
        return [memoryview(of[0][block].view(-1).view(torch.uint8).numpy()) for of in self.pool]  # type: ignore[arg-type]

    def new(self) -> int:
        return self._entered(self.blocks.new())

    def fork(self, sequence: int) -> int:
        name = self._entered(self.blocks.fork(sequence))
        if self._entries:
            old, new = self._entries[sequence], self._entries[name]
            for states in (of for of in self.pool if len(of) == 2):
                for each in states:
                    each[new] = each[old]
        return name

    def drop(self, sequence: int) -> None:
        self.blocks.drop(sequence)
        if (entry := self._entries.pop(sequence, None)) is not None:
            self._free.append(entry)

    def _entered(self, sequence: int) -> int:
        if self._step.state_bytes:
            if not self._free:
                self.blocks.drop(sequence)
                raise OutOfBlocksError(f"there is room for the states of {self.most_sequences} sequences")
            self._entries[sequence] = self._free.pop()
        return sequence

    def cut(self, sequence: int, length: int) -> None:
        self.blocks.cut(sequence, length)

    def step(self, rows: Sequence[Rows]) -> list[Result]:
        for old, new in self.blocks.append_all([(one.sequence, len(one.tokens)) for one in rows]):
            for states in (of[0] for of in self.pool if len(of) == 1):
                states[new] = states[old]
        results: dict[int, Result] = {}
        for several in self._passes(rows):
            results |= self._run(several)
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

    def _run(self, rows: list[Rows]) -> dict[int, Result]:
        """One pass. Where it fails, each of ``rows`` gets another: one's error is not the others'."""
        try:
            if len(rows[0].tokens) > self._step.most_rows:
                return {rows[0].sequence: self._forward(rows[0])}
            return self._run_rows(rows)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if len(rows) == 1:
                return {rows[0].sequence: error}
            return {one.sequence: self._run([one])[one.sequence] for one in rows}

    def _run_rows(self, rows: list[Rows]) -> dict[int, Result]:
        tokens, wanted, sequences = list[int](), list[int](), list[SequenceRows]()
        for one in rows:
            tokens += one.tokens
            wanted += range(len(tokens) - one.wanted, len(tokens))
            count = len(one.tokens)
            past, entry = self.blocks.length(one.sequence) - count, self._entries.get(one.sequence, 0)
            sequences.append(SequenceRows(count, past, self.blocks.table(one.sequence), entry))
        with torch.inference_mode():
            if not self._step.is_unchanged():
                raise UnsupportedCallError("the model was changed while it was served; serve it again")
            logits = self._model.fate.run_rows(tokens, sequences, self.pool, wanted, self.on_pass)
        return dict(zip((one.sequence for one in rows), logits.split([one.wanted for one in rows]), strict=True))

    def _forward(self, rows: Rows) -> torch.Tensor:
        """A prompt, through the model's own forward."""
        if self.blocks.length(rows.sequence) != len(rows.tokens):
            raise UnsupportedCallError(f"this model reads {self._step.most_rows} tokens at once behind others")
        table, cache = torch.tensor(self.blocks.table(rows.sequence)), DynamicCache()
        entry = self._entries.get(rows.sequence, 0)
        cache.layers = [_PoolState(*of, entry) if len(of) == 2 else _PoolLayer(of[0], table) for of in self.pool]
        with torch.inference_mode(), watched(self._model, rows.watch):
            inputs = torch.tensor([rows.tokens])
            self.on_pass()
            output = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=max(1, rows.wanted))
        return output.logits[0, output.logits.shape[1] - rows.wanted :]  # type: ignore[no-any-return]


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
