"""What is asked of a scheduler, and the events that answer it. Plain data: no torch, no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = ["Choice", "Event", "Finished", "Piece", "Queued", "Reading", "Request", "Sampling", "Timings", "TokenRecord", "Usage"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None: as the model's generation config says.

    ``temperature`` 0 takes the likeliest token. ``presence_penalty`` and ``frequency_penalty`` look at what was generated,
    ``repetition_penalty`` at the prompt too (transformers' definition). ``seed`` None: a random one.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One text to generate after ``prompt`` (token ids).

    ``stop``: strings that end the text and are not part of it. ``top_logprobs``: record each token's log probability and so many
    of the likeliest ones' (None: nothing). ``prompt_logprobs``: record them for the prompt too. ``keep_special``: special tokens
    are part of the text, for a parser. ``continues``: the text is decoded as what follows the prompt's, so that a leading space
    stays. ``constraint`` makes a transformers LogitsProcessor, once, in the inference thread.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    keep_special: bool = False
    continues: bool = False
    constraint: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Queued:
    """Waiting; ``position`` requests are served before this one, the running one among them."""

    position: int


@dataclass(frozen=True)
class Reading:
    """The prompt is being read: ``done`` of ``total`` tokens' worth of work."""

    done: int
    total: int


Choice: TypeAlias = "tuple[int, float]"  # a token id and its log probability


@dataclass(frozen=True)
class TokenRecord:
    """A token of the text. ``logprob`` (None unless asked for, and for a prompt's first token) is the model's own, before any
    sampling option; ``top`` are the likeliest tokens at this place, likeliest first."""

    token: int
    logprob: float | None = None
    top: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Piece:
    """More of the text, and the tokens that became whole with it. A character that spans tokens is never cut."""

    text: str
    tokens: tuple[TokenRecord, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, of those from a cache, and generated ones (the one that ended the text among them); drafted ones that
    were checked, and those of them that are part of the text."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds of wall clock, and what the experts' traffic was meanwhile."""

    queued_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    ready_on_time: float = 1.0
    bytes_read: int = 0
    stall_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


Reason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Finished:
    """The last event. ``stop``: the stop string that ended the text (None: the model ended it). ``message`` says what failed.

    ``prompt``: the prompt's tokens with their log probabilities, where they were asked for.
    """

    reason: Reason
    usage: Usage
    timings: Timings = field(default_factory=Timings)
    stop: str | None = None
    message: str = ""
    prompt: tuple[TokenRecord, ...] = ()


Event: TypeAlias = "Queued | Reading | Piece | Finished"
