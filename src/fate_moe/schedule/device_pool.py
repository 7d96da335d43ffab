"""The executor of models on a GPU that have a captured step: rows of several sequences in one step, over one cache in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import StaticCache

from fate_moe.core import KV_BLOCK
from fate_moe.engine.cuda_decode import CapturedDecode
from fate_moe.schedule.blocks import Blocks
from fate_moe.schedule.disk_prefixes import DiskPrefixes
from fate_moe.schedule.executor import Result, Rows, watched
from fate_moe.schedule.prefixes import Prefixes

__all__ = ["DevicePoolExecutor"]

# Tokens of a prompt that transformers' layers read at once. Their products depend on how many these are, so it is the same for
# every text and every budget. Fewer let texts share shorter beginnings, and copy missing experts more often.
CHUNK = 512


class DevicePoolExecutor:
    """Blocks lie in the memory of ``decode``'s cache, so that nothing is set aside twice. Prompts are read by transformers' layers
    as in ``generate()``; what follows goes through the captured step, where a row's bits do not depend on others."""

    shares_passes = takes_drafts = True
    any_cut = False
    chunk: int | None = CHUNK
    state_bytes = 0
    disk: DiskPrefixes | None = None
    most_sequences: int | None = None

    def __init__(self, model: Any, decode: CapturedDecode, num_blocks: int, most_kept: int | None = None) -> None:
        """``most_kept`` blocks may be kept of texts that ended (None: all)."""
        self._model, self._decode = model, decode
        self.on_pass: Callable[[], None] = lambda: None
        self.blocks = Blocks(num_blocks)
        kept = Prefixes(self.blocks, most=most_kept, several=CHUNK // KV_BLOCK)
        self.prefixes = None if most_kept == 0 else kept
        self.block_bytes = sum(2 * layer.keys[0, :, :KV_BLOCK].nbytes for layer in decode.cache.layers)
        self._names = set[int]()
        self._held = ExitStack()  # holds the cache while there are sequences
        with decode.blocks():
            decode.record_rows()
        self._uses = decode.uses

    def new(self) -> int:
        return self._entered(self.blocks.new)

    def begin(self, tokens: Sequence[int]) -> tuple[int, int]:
        prefixes = self.prefixes
        assert prefixes is not None
        name = self._entered(lambda: prefixes.begin(tokens)[0])
        return name, self.blocks.length(name)

    def fork(self, sequence: int) -> int:
        return self._entered(lambda: self.blocks.fork(sequence))

    def _entered(self, make: Callable[[], int]) -> int:
        self._decode.check_unchanged()
        self.hold()
        self._names.add(name := make())
        return name

    def hold(self) -> None:
        """Have the cache to ourselves while there are sequences. What another has written over since is kept no longer."""
        if self._names:
            return
        self._held.enter_context(self._decode.blocks())
        if self.prefixes is not None and self._decode.uses != self._uses + 1:
            self.prefixes.clear()
        self._uses = self._decode.uses

    def drop(self, sequence: int) -> None:
        self.blocks.drop(sequence)
        self._names.discard(sequence)
        if not self._names:
            self._held.close()

    def cut(self, sequence: int, length: int) -> None:
        self.blocks.cut(sequence, length)

    def learn(self, kept: Sequence[int]) -> None:
        """The captured step itself has counted all rows."""

    def step(self, rows: Sequence[Rows]) -> list[Result]:
        self._decode.copy_blocks(self.blocks.append_all([(one.sequence, len(one.tokens)) for one in rows]))
        results = {one.sequence: self._guarded(partial(self._forward, one)) for one in rows if not self._is_decode(one)}
        if decoded := [one for one in rows if self._is_decode(one)]:
            made = self._guarded(lambda: self._rows(decoded))
            if isinstance(made, BaseException):
                results |= dict.fromkeys((one.sequence for one in decoded), made)
            else:
                parts = torch.split(made, [len(one.tokens) for one in decoded])
                results |= {one.sequence: part[len(part) - one.wanted :] for one, part in zip(decoded, parts, strict=True)}
        return [results[one.sequence] for one in rows]

    def _past(self, rows: Rows) -> int:
        return self.blocks.length(rows.sequence) - len(rows.tokens)

    def _is_decode(self, rows: Rows) -> bool:
        """Whether ``rows`` are a token, and drafts behind it, whatever the text was cut into."""
        return self._past(rows) > 0 and len(rows.tokens) in (1, rows.wanted)

    def _guarded(self, work: Callable[[], torch.Tensor]) -> Result:
        try:
            with torch.inference_mode():
                return work()
        except BaseException as error:  # a panic of a library in Rust is no Exception
            return error

    def _rows(self, rows: Sequence[Rows]) -> torch.Tensor:
        tokens, positions, tables = list[int](), list[int](), list[Sequence[int]]()
        for one in rows:
            tokens += one.tokens
            positions += range(self._past(one), self._past(one) + len(one.tokens))
            tables += [self.blocks.table(one.sequence)] * len(one.tokens)
        self.on_pass()
        return self._decode.read(tokens, positions, tables)

    def _forward(self, rows: Rows) -> torch.Tensor:
        """A part of a prompt, through the model's own forward."""
        cache = StaticCache(config=self._model.config, max_cache_len=KV_BLOCK)
        cache.layers = self._decode.layers(self.blocks.table(rows.sequence), self._past(rows))
        with watched(self._model, rows.watch):
            inputs = torch.tensor([rows.tokens], device=self._model.device)
            self.on_pass()
            output = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=max(1, rows.wanted))
        return output.logits[0, output.logits.shape[1] - rows.wanted :]  # type: ignore[no-any-return]
