"""Answers in a conversation: each prompt is read from where it differs from earlier ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fate_moe.errors import FateError
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.request import Finished, Piece, Reading, Request, Sampling
from fate_moe.tools.generate import generate
from fate_moe.tools.tokens import as_input

__all__ = ["Answer", "Answering"]

_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Answer:
    """``cached_tokens`` of the prompt's did not have to be read; ``first_seconds`` passed until the first token."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int = 0
    first_seconds: float = 0.0


class Answering:
    """A loaded model's answers, one at a time, through a scheduler as a server has it. Beams, which it does not have, are followed
    by ``generate()``, which reads each prompt whole. ``close`` it before the model.

    ``options`` are those of ``generate()``; ``seed`` (None: a random one) makes sampling repeatable.
    """

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any], seed: int | None = None) -> None:
        self._model, self._tokenizer, self._options, self._seed = model, tokenizer, options, seed
        self._turns = 0
        in_beams = (options.get("num_beams") or model.generation_config.num_beams or 1) > 1
        self._scheduler = None if in_beams else BatchScheduler(lambda: (model, tokenizer), parallel=1)

    def answer(
        self,
        ids: Sequence[int],
        most_tokens: int,
        on_text: Callable[[str], None],
        on_read: Callable[[int, int], None] = lambda done, total: None,
    ) -> Answer:
        """What the model says after ``ids``; ``on_text`` gets each piece, ``on_read`` how many tokens of the prompt are read, of
        how many. Raises FateError, and what these raise.

        An interrupt ends the text; the next one may begin.
        """
        if self._scheduler is None:
            options = {**self._options, "max_new_tokens": most_tokens}
            made = generate(self._model, self._tokenizer, as_input(ids), on_text, on_read, **options)
            return Answer(made.text, tuple(made.tokens), made.prompt_tokens, first_seconds=made.prefill_seconds)
        return asyncio.run(self._answer(Request(tuple(ids), most_tokens, self._sampling()), on_text, on_read))

    def kept_files(self, ids: Sequence[int]) -> list[str]:
        """Names, under the folder of ``--prefix-cache-disk``, of the files that a text of ``ids`` has or will have there."""
        return self._scheduler.kept_files(ids) if self._scheduler is not None else []

    def close(self) -> None:
        """End; what is kept of the texts is written to the disk first."""
        if self._scheduler is not None:
            self._scheduler.close()

    def _sampling(self) -> Sampling:
        given = {name: self._options[name] for name in _SAMPLED if name in self._options}
        do_sample = self._options.get("do_sample")
        if do_sample is False:
            given["temperature"] = 0.0
        elif do_sample:
            given.setdefault("temperature", self._model.generation_config.temperature or 1.0)
        self._turns += 1
        seed = None if self._seed is None else (self._seed + self._turns - 1) % (1 << 63)
        return Sampling(**given, seed=seed)

    async def _answer(self, request: Request, on_text: Callable[[str], None], on_read: Callable[[int, int], None]) -> Answer:
        assert self._scheduler is not None
        ticket, said, tokens = self._scheduler.submit(request), list[str](), list[int]()
        try:
            async for events in ticket:
                for event in events:
                    if isinstance(event, Piece):
                        said.append(event.text)
                        tokens += [record.token for record in event.tokens]
                        on_text(event.text)
                    elif isinstance(event, Reading):
                        on_read(event.done, event.total)
                    elif isinstance(event, Finished):
                        end = event
        finally:
            ticket.cancel()
        if end.reason == "error":
            raise FateError(end.message)
        first = end.timings.queued_seconds + end.timings.prompt_seconds
        return Answer("".join(said), tuple(tokens), end.usage.prompt_tokens, end.usage.cached_tokens, first)
