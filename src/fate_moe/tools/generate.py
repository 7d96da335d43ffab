"""Generates text and measures prefill and decode separately."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

__all__ = ["Generation", "generate"]


@dataclass
class Generation:
    """One generated text. ``tokens`` are the new token ids; times are in seconds of wall clock."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first, divided by their time; 0.0 if there was only one."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 and self.decode_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "prefill_seconds": self.prefill_seconds,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


def generate(
    model: Any,
    tokenizer: Any,
    inputs: torch.Tensor,
    on_text: Callable[[str], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Generation:
    """Continue ``inputs`` [1, prompt_tokens] with ``model.generate(**options)``; ``on_text`` is called with each piece of text, and
    ``on_read``, of a prompt that is read in pieces, with the tokens that are read and how many there are.

    Beams decide at the end which text it is: with ``num_beams`` the text is one piece.
    """
    in_beams = (options.get("num_beams") or model.generation_config.num_beams or 1) > 1
    clock = _Clock(_Printer(tokenizer, on_text) if on_text and not in_beams else None)
    watch: dict[str, Any] = {"stopping_criteria": [_Ticks(clock)]} if in_beams else {"streamer": clock}
    if "custom_generate" in options:
        watch["loop_streamer"] = clock  # schedule/drafted.py
    if model.generation_config.pad_token_id is None and "pad_token_id" not in options:
        options["pad_token_id"] = tokenizer.eos_token_id
    with torch.inference_mode(), _reading(model, on_read):
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), tokenizer=tokenizer, **watch, **options)
    tokens = output[0, inputs.shape[1] :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if on_text and in_beams:
        on_text(text)
    return Generation(
        text=text,
        tokens=tokens,
        prompt_tokens=inputs.shape[1],
        prefill_seconds=clock.times[0] - clock.began if clock.times else 0.0,
        decode_seconds=clock.times[-1] - clock.times[0] if clock.times else 0.0,
    )


@contextmanager
def _reading(model: Any, on_read: Callable[[int, int], None] | None) -> Iterator[None]:
    step = getattr(model.fate, "step", None)
    if step is None or on_read is None:
        yield
        return
    step.on_read = on_read
    try:
        yield
    finally:
        step.on_read = None


@dataclass
class _Clock(BaseStreamer):  # type: ignore[misc]
    """Records when each token came, and passes it on."""

    inner: BaseStreamer | None
    began: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    seen_prompt: bool = False

    def put(self, value: torch.Tensor) -> None:
        if self.seen_prompt:
            self.times.append(time.perf_counter())
        self.seen_prompt = True
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()


class _Ticks(StoppingCriteria):  # type: ignore[misc]
    """Tells the clock of each step of a beam search, which has no streamer; never stops it."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._clock.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Printer(TextStreamer):  # type: ignore[misc]
    """transformers' streamer, with a function that receives the text."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)
