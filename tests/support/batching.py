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
from fate_moe.schedule.states import Mark, States

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

    ``files``: where prefixes are kept too. ``num_states``: what comes next depends on a state too, of which there are so many, kept
    on the disk in ``state_files``.

    Without ``any_cut`` what comes next depends on the cut too: on where the step that read a token began. ``chunk``: see Executor.
    """

    shares_passes = True
    block_bytes = 8 * KV_BLOCK
    state_bytes = 8

    def __init__(
        self,
        num_blocks: int,
        any_cut: bool = True,
        is_open: bool = True,
        files: BlockFiles | None = None,
        num_states: int = 0,
        state_files: BlockFiles | None = None,
        chunk: int | None = None,
    ) -> None:
        self.blocks, self.any_cut, self.is_open = Blocks(num_blocks), any_cut, is_open
        self.chunk = chunk
        self.states = States(num_states) if num_states else None
        self.held = array("q", [-1] * num_states)
        self.most_sequences = num_states or None
        several = (chunk or KV_BLOCK) // KV_BLOCK
        self.prefixes = Prefixes(self.blocks, states=self.states, several=several) if any_cut or chunk else None
        self.disk: DiskPrefixes | None = None
        if files is not None and self.prefixes is not None:
            self.disk = DiskPrefixes(files, self.prefixes, lambda block: [memoryview(self.memory[block]).cast("B")])
            if state_files is not None:
                self.disk.keep_states(state_files, lambda entry: [memoryview(self.held).cast("B")[8 * entry : 8 * entry + 8]])
        self.takes_drafts = any_cut and not num_states
        self.on_pass: Callable[[], None] = lambda: None
        self.gate = threading.Semaphore(0)
        self.memory = [array("q", [0] * KV_BLOCK) for _ in range(num_blocks)]
        self.steps: list[list[Rows]] = []
        self.cuts = 0
        self.learned: list[list[int]] = []

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
        if self.states is not None:
            entry = self.states.enter(sequence)
            self.held[entry] = self.held[source] if source is not None else -1
        return sequence

    def cut(self, sequence: int, length: int) -> None:
        self.blocks.cut(sequence, length)
        self.cuts += 1

    def learn(self, kept: Sequence[int]) -> None:
        assert all(0 <= count <= one.drafted for count, one in zip(kept, self.steps[-1], strict=True))
        self.learned.append(list(kept))

    def step(self, rows: Sequence[Rows]) -> list[Result]:
        while not self.is_open and not self.gate.acquire(timeout=0.01):
            pass
        self.steps.append(list(rows))
        for old, new in self.blocks.append_all([(one.sequence, len(one.tokens)) for one in rows]):
            self.memory[new][:] = self.memory[old]
        taken = [self.states.take(one.marks) if self.states is not None else [] for one in rows]
        results = [self._read(one, marks) for one, marks in zip(rows, taken, strict=True)]
        for marks, result in zip(taken, results, strict=True):
            if self.states is not None:
                self.states.put(marks, isinstance(result, torch.Tensor))
        self.blocks.check_integrity()
        if self.prefixes is not None:
            self.prefixes.check_integrity()
        return results

    def _states(self, rows: Rows, began: int, taken: list[tuple[Mark, int]]) -> list[int]:
        """After each row; 0 where there are none."""
        if self.states is None:
            return [0] * len(rows.tokens)
        entry, places, found = self.states.entry(rows.sequence), {mark.position: to for mark, to in taken}, list[int]()
        state = self.held[entry] if began else 0
        for position, token in enumerate(rows.tokens, began + 1):
            state = (state * 31 + token + 1) % (1 << 61)
            found.append(state)
            if position in places:
                self.held[places[position]] = state
        self.held[entry] = state
        return found

    def _read(self, rows: Rows, taken: list[tuple[Mark, int]]) -> Result:
        if POISON in rows.tokens:
            return ValueError("poison")
        table, length = self.blocks.table(rows.sequence), self.blocks.length(rows.sequence)
        began = length - len(rows.tokens)
        for position, token in enumerate(rows.tokens, began):  # a cell depends on all tokens before it, as keys do
            before = self.memory[table[(position - 1) // KV_BLOCK]][(position - 1) % KV_BLOCK] if position else 0
            cell = (before * 1_000_003 + token + 1 + (0 if self.any_cut else began << 8)) % (1 << 61)
            self.memory[table[position // KV_BLOCK]][position % KV_BLOCK] = cell
        held = [self.memory[table[position // KV_BLOCK]][position % KV_BLOCK] for position in range(length)]
        states = self._states(rows, began, taken)
        logits = [self._logits([*held[: length - back], states[-1 - back]]) for back in range(rows.wanted)]
        return torch.stack(logits[::-1]) if logits else torch.empty(0, VOCAB)

    def _logits(self, held: list[Any]) -> torch.Tensor:
        digest = hashlib.blake2b(repr(held).encode(), digest_size=VOCAB).digest()
        logits = torch.tensor(list(digest), dtype=torch.float32) / 64
        logits[0] -= 2.0  # texts of some length
        logits[POISON] = -100.0
        return logits
