"""A model without numbers: what comes next is a function of the tokens that its blocks hold, so a wrong block is another text."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from fate_moe.core import KV_BLOCK, Counters
from fate_moe.schedule.block_files import BlockFiles
from fate_moe.schedule.blocks import Blocks
from fate_moe.schedule.disk_prefixes import DiskPrefixes
from fate_moe.schedule.executor import Result, Rows
from fate_moe.schedule.prefixes import Prefixes

__all__ = ["POISON", "VOCAB", "FakeExecutor", "FakeModel", "FakeTokenizer"]

VOCAB = 16  # token 0 ends a text
POISON = 15  # an executor fails on it


class FakeTokenizer:
    eos_token_id = 0

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(chr(97 + token) for token in tokens)


class FakeModel:
    """As much of a transformers model as a scheduler asks for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.generation_config = GenerationConfig(eos_token_id=0, do_sample=True, temperature=0.8)
        self.fate = SimpleNamespace(counters=Counters)

    def generate(
        self, inputs: Any, custom_generate: Any, generation_config: Any, logits_processor: Any, attention_mask: Any
    ) -> Any:
        processors = [*logits_processor]
        if (penalty := generation_config.repetition_penalty) is not None:
            processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        if generation_config.do_sample:
            processors.append(TemperatureLogitsWarper(generation_config.temperature))
        return custom_generate(self, inputs, processors, [], generation_config)


class FakeExecutor:
    """Keeps tokens in blocks. Each step waits until ``gate`` lets it, unless ``is_open``.

    ``files``: where prefixes are kept too.

    Without ``any_cut`` what comes next depends on the cut too: on where the step that read a token began. ``chunk``: see Executor.
    """

    shares_passes = True
    block_bytes = 8 * KV_BLOCK
    most_sequences: int | None = None

    def __init__(
        self,
        num_blocks: int,
        any_cut: bool = True,
        is_open: bool = True,
        files: BlockFiles | None = None,
        chunk: int | None = None,
    ) -> None:
        self.blocks, self.any_cut, self.is_open = Blocks(num_blocks), any_cut, is_open
        self.chunk = chunk
        self.prefixes = Prefixes(self.blocks, several=(chunk or KV_BLOCK) // KV_BLOCK) if any_cut or chunk else None
        self.disk: DiskPrefixes | None = None
        if files is not None and self.prefixes is not None:
            self.disk = DiskPrefixes(files, self.prefixes, lambda block: [memoryview(self.memory[block]).cast("B")])
        self.takes_drafts = any_cut
        self.on_pass: Callable[[], None] = lambda: None
        self.gate = threading.Semaphore(0)
        self.memory = [array("q", [0] * KV_BLOCK) for _ in range(num_blocks)]
        self.steps: list[list[Rows]] = []
        self.cuts = 0

    def new(self) -> int:
        return self.blocks.new()

    def fork(self, sequence: int) -> int:
        return self.blocks.fork(sequence)

    def drop(self, sequence: int) -> None:
        self.blocks.drop(sequence)

    def cut(self, sequence: int, length: int) -> None:
        self.blocks.cut(sequence, length)
        self.cuts += 1

    def step(self, rows: Sequence[Rows]) -> list[Result]:
        while not self.is_open and not self.gate.acquire(timeout=0.01):
            pass
        self.steps.append(list(rows))
        for old, new in self.blocks.append_all([(one.sequence, len(one.tokens)) for one in rows]):
            self.memory[new][:] = self.memory[old]
        self.blocks.check_integrity()
        return [self._read(one) for one in rows]

    def _read(self, rows: Rows) -> Result:
        if POISON in rows.tokens:
            return ValueError("poison")
        table, length = self.blocks.table(rows.sequence), self.blocks.length(rows.sequence)
        began = length - len(rows.tokens)
        for position, token in enumerate(rows.tokens, began):  # a cell depends on all tokens before it, as keys do
            before = self.memory[table[(position - 1) // KV_BLOCK]][(position - 1) % KV_BLOCK] if position else 0
            cell = (before * 1_000_003 + token + 1 + (0 if self.any_cut else began << 8)) % (1 << 61)
            self.memory[table[position // KV_BLOCK]][position % KV_BLOCK] = cell
        held = [self.memory[table[position // KV_BLOCK]][position % KV_BLOCK] for position in range(length)]
        logits = [self._logits(held[: length - back]) for back in range(rows.wanted)]
        return torch.stack(logits[::-1]) if logits else torch.empty(0, VOCAB)

    def _logits(self, held: list[Any]) -> torch.Tensor:
        digest = hashlib.blake2b(repr(held).encode(), digest_size=VOCAB).digest()
        logits = torch.tensor(list(digest), dtype=torch.float32) / 64
        logits[0] -= 2.0  # texts of some length
        logits[POISON] = -100.0
        return logits
