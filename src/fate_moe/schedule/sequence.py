"""One request while it is worked on: its tokens, the text that they become, its events and its times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fate_moe.schedule.prompt_logprobs import record_of
from fate_moe.schedule.request import Event, Finished, Reading, Reason, Request, Timings, TokenRecord, Usage
from fate_moe.schedule.sampling import Sampler, eos_ids
from fate_moe.schedule.speculation import Drafter
from fate_moe.schedule.text import TextStream, decoder

__all__ = ["CancelledError", "TextSequence"]

# Tokens of the prompt that the text is decoded after: enough for any character and for a decoder's rule on leading spaces.
_CONTEXT_TOKENS = 8
_PROGRESS_SECONDS = 0.1  # between two events that say how far a prompt is


class CancelledError(Exception):
    """Raised inside a forward pass of the prompt of a request that was cancelled."""


class TextSequence:
    """``tokens`` are the prompt and what was generated; the model has read the first ``read`` of them, as its sequence ``name``
    (None: it has none). ``deliver`` gets the request's events but the last.
    """

    def __init__(
        self,
        request: Request,
        order: int,
        submitted: float,
        deliver: Callable[[Event], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """``order``: of arrival. ``submitted`` is when the request came (time.perf_counter)."""
        self.request, self.order, self._deliver, self._is_cancelled = request, order, deliver, is_cancelled
        self.tokens = list(request.prompt)
        self.read = 0
        self.cached: int | None = None  # tokens of the prompt that were there when it was first read
        self.name: int | None = None
        self.sampler: Sampler | None = None
        self.drafter: Drafter | None = None
        self.drafted = self.accepted = 0  # tokens of all passes
        self.draft: list[int] = []  # tokens that may follow ``tokens``, read in the pass under way
        self.prompt_records: list[TokenRecord] = []
        self._submitted = submitted
        self._began: float | None = None
        self._first_at = self._last_at = self._told = 0.0
        self._by_model = False  # ended by a token that ends texts

    def begin(self, model: Any, tokenizer: Any, seed: int) -> None:
        """Work begins, in the inference thread."""
        request = self.request
        self._began = self._told = time.perf_counter()
        self._model, self._counters = model, model.fate.counters()
        self._eos = set() if request.ignore_eos else eos_ids(model, tokenizer)
        context = request.prompt[-_CONTEXT_TOKENS:] if request.continues else ()
        self._text = TextStream(decoder(tokenizer, not request.keep_special), request.stop, context)
        if request.prompt_logprobs:
            self.prompt_records = [TokenRecord(request.prompt[0])]
        self._deliver(Reading(0, len(request.prompt)))
        if request.max_new_tokens > 0:
            self.sampler = Sampler(model, request, seed)

    @property
    def has_begun(self) -> bool:
        return self._began is not None

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled()

    @property
    def generated(self) -> int:
        """Tokens that were generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def target(self) -> int:
        """So many of ``tokens`` are to be read now: all, but the last of a prompt that nothing is to follow."""
        return len(self.tokens) - (self.sampler is None)

    @property
    def most_tokens(self) -> int:
        """Positions that it may come to take."""
        return len(self.request.prompt) + max(0, self.request.max_new_tokens - 1)

    @property
    def wants_prompt_records(self) -> bool:
        """Whether log probabilities of the prompt are asked for and not all there."""
        return self.request.prompt_logprobs and len(self.prompt_records) < len(self.request.prompt)

    @property
    def may_begin_behind(self) -> bool:
        """Whether it may begin behind what was read for others: nothing is asked of the prompt's own positions."""
        return self.request.max_new_tokens > 0 and not self.request.prompt_logprobs

    def forget(self) -> None:
        """The model has dropped the sequence; it will be read again."""
        self.name, self.read, self.draft = None, 0, []

    def progress(self, share: float) -> None:
        """Called while its rows are computed; ``share`` of them is done. Raises CancelledError."""
        if self.is_cancelled:
            raise CancelledError
        now = time.perf_counter()
        if not self.generated and now - self._told > _PROGRESS_SECONDS:
            self._told = now
            self._deliver(Reading(self.read + int(share * (self.target - self.read)), len(self.request.prompt)))

    def record_prompt(self, logits: torch.Tensor) -> None:
        """``logits`` [rows, vocab] of the positions up to ``read``: what they say of the prompt's next tokens."""
        prompt, top = self.request.prompt, self.request.top_logprobs or 0
        for place, row in enumerate(logits, self.read - len(logits) + 1):
            if place == len(self.prompt_records) < len(prompt):  # of what is read again, the records are there
                self.prompt_records.append(record_of(row.float(), prompt[place], top))

    def follow(self, token: int, logits: torch.Tensor) -> Reason | None:
        """``token`` was chosen by ``logits`` [vocab]: deliver its text. Why it is the last one; None: the text goes on."""
        self._last_at = time.perf_counter()
        if not self.generated:
            self._first_at = self._last_at
        self.tokens.append(token)
        if token in self._eos:
            self._by_model = True
        else:
            top = self.request.top_logprobs
            record = TokenRecord(token) if top is None else record_of(logits.float(), token, top)
            if (piece := self._text.push(record)) is not None:
                self._deliver(piece)
        if self._by_model or self._text.stopped is not None:
            return "stop"
        assert self.sampler is not None
        return "length" if self.generated >= self.request.max_new_tokens or self.sampler.is_over else None

    def finished(self, reason: Reason, message: str = "") -> Finished:
        """The last event; before it, text that was held back is delivered where the text is whole."""
        usage = Usage(len(self.request.prompt), self.generated, self.cached or 0, self.drafted, self.accepted)
        now = time.perf_counter()
        if self._began is None:
            return Finished(reason, usage, Timings(queued_seconds=now - self._submitted), message=message)
        if reason in ("stop", "length") and (piece := self._text.finish()) is not None:
            self._deliver(piece)
            if self._text.stopped is not None:
                reason = "stop"
        traffic = self._model.fate.counters().since(self._counters)
        prompt_seconds = (self._first_at if self.generated else now) - self._began
        decode_seconds = self._last_at - self._first_at
        return Finished(
            reason,
            usage,
            Timings(
                queued_seconds=self._began - self._submitted,
                prompt_seconds=prompt_seconds,
                decode_seconds=decode_seconds,
                prompt_tokens_per_second=usage.prompt_tokens / prompt_seconds if prompt_seconds > 0 else 0.0,
                decode_tokens_per_second=(self.generated - 1) / decode_seconds if decode_seconds > 0 else 0.0,
                ready_on_time=traffic.ready_on_time,
                bytes_read=traffic.bytes_read,
                stall_seconds=traffic.stall_seconds,
            ),
            stop=self._text.stopped,
            message=message,
            prompt=tuple(self.prompt_records),
        )
