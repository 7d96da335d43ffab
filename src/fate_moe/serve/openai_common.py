"""What all APIs share (checks, limits, ids), and what OpenAI's two older ones do (sampling parameters, usage, streams)."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints
from sse_starlette import ServerSentEvent

from fate_moe.adapter.sampling import GREEDY_BELOW
from fate_moe.schedule.request import Finished, Sampling, TokenRecord
from fate_moe.serve.answers import Answers, Done, Said, Waiting
from fate_moe.serve.card import ModelCard
from fate_moe.serve.errors import ApiError, error_body
from fate_moe.serve.wire import Body, comment, joined, sse

__all__ = [
    "MOST_STOPS",
    "SamplingBody",
    "StopString",
    "chat_logprobs",
    "check_model",
    "chunk_stream",
    "greedy_if_tiny",
    "new_id",
    "room_for",
    "token_text",
    "usage_of",
]

MOST_STOPS = 16
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingBody(Body):
    """Parameters that mean the same in all of OpenAI's APIs, and those that vLLM and llama-server added."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopString | list[StopString] | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Of no effect on the answer here, as in the APIs: who asks, and how it is billed or kept.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings. Raises ApiError for too many."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MOST_STOPS:
            raise ApiError(f"'stop' takes at most {MOST_STOPS} strings", "stop", "invalid_value")
        return stops

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage. Raises ApiError for stream_options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise ApiError("'stream_options' needs 'stream': true", "stream_options", "invalid_value")
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, card: ModelCard, index: int = 0) -> Sampling:
        """Of answer number ``index``: with a seed, each has its own. Raises ApiError for tokens that the model does not have."""
        bias = {}
        for name, value in (self.logit_bias or {}).items():
            if not name.isascii() or not name.isdigit() or len(name) > 9 or int(name) >= card.vocab_size:
                raise ApiError(f"'logit_bias': there is no token {name[:20]!r}", "logit_bias", "invalid_value")
            bias[int(name)] = value
        seed = self.seed if self.seed is None else (self.seed + index + (1 << 63)) % (1 << 64) - (1 << 63)
        return Sampling(
            temperature=greedy_if_tiny(self.temperature),
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias=bias,
            seed=seed,
        )


def greedy_if_tiny(temperature: float | None) -> float | None:
    """``temperature``, or 0 where it is so low that dividing by it would overflow."""
    return 0.0 if temperature is not None and temperature < GREEDY_BELOW else temperature


def check_model(card: ModelCard, model: str | None) -> None:
    """Raise ApiError where a client asks for a model that is not served."""
    if model is not None and model != card.name:
        raise ApiError(f"the model '{model}' is not served here; '{card.name}' is", "model", "model_not_found", 404)


def room_for(card: ModelCard, prompt_tokens: int, wanted: int | None, param: str) -> int:
    """How many tokens may be generated: ``wanted`` (None: all), or as many as the context has left.

    Raises ApiError where the prompt alone fills the context.
    """
    if prompt_tokens == 0:
        raise ApiError(f"'{param}' has no tokens", param, "invalid_value")
    room = card.context_length - prompt_tokens
    if room < 1 and wanted != 0:
        raise ApiError(
            f"this model's context is {card.context_length} tokens, and the prompt takes {prompt_tokens}; shorten it, or start the "
            "server with a larger --context-length",
            param,
            "context_length_exceeded",
        )
    if room < 0:
        raise ApiError(
            f"this model's context is {card.context_length} tokens, and the prompt takes {prompt_tokens}",
            param,
            "context_length_exceeded",
        )
    return room if wanted is None else min(room, wanted)


def usage_of(ends: Sequence[Finished]) -> dict[str, Any]:
    """OpenAI's usage of all answers to one prompt."""
    prompt = ends[0].usage.prompt_tokens if ends else 0
    completion = sum(end.usage.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.usage.cached_tokens for end in ends)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(end.usage.accepted_tokens for end in ends),
            "rejected_prediction_tokens": sum(end.usage.drafted_tokens - end.usage.accepted_tokens for end in ends),
        },
    }


def token_text(card: ModelCard, token: int) -> str:
    """A token alone, as log probabilities show it: a part of a character is a replacement character."""
    return card.decode([token])


def chat_logprobs(card: ModelCard, tokens: Sequence[TokenRecord]) -> dict[str, Any]:
    """The log probabilities of a chat answer's tokens."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(card, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**one(record.token, record.logprob), "top_logprobs": [one(*choice) for choice in record.top]} for record in tokens
        ],
        "refusal": None,
    }


async def chunk_stream(
    answers: Answers,
    head: dict[str, Any],
    chunks: Callable[[Said | Done], Iterable[dict[str, Any]]],
    usage: Callable[[Sequence[Finished]], dict[str, Any]] | None,
) -> AsyncIterator[bytes]:
    """The stream of a chat or a completion: comments while nothing is said, then ``chunks``, each with ``head``, then one with the
    ``usage`` of all answers, in order (None: no such chunk), and [DONE]. An error ends it early."""
    every = head if usage is None else {**head, "usage": None}
    ends: dict[int, Finished] = {}
    try:
        async for batch in answers.batches():
            events: list[ServerSentEvent] = []
            for event in batch:
                if isinstance(event, Waiting):
                    events.append(comment(event.status))
                    continue
                if isinstance(event, Done):
                    ends[event.index] = event.finished
                events += [sse({**every, **chunk}) for chunk in chunks(event)]
            if len(ends) == answers.number:
                if usage is not None:
                    events.append(sse({**head, "choices": [], "usage": usage([ends[index] for index in sorted(ends)])}))
                events.append(sse("[DONE]"))
            if events:
                yield joined(events)
    except ApiError as error:
        yield joined([sse(error_body("/v1/completions", error))])


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"
