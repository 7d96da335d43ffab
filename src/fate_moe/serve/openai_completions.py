"""``/v1/completions``: text after a prompt, without a chat template."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from fate_moe.schedule.request import Finished, TokenRecord
from fate_moe.schedule.request import Request as TextRequest
from fate_moe.serve.answers import Answer, Answers, ClientGoneError, Done, Plan, Said, collect, now
from fate_moe.serve.card import ModelCard
from fate_moe.serve.errors import ApiError, unsupported
from fate_moe.serve.openai_common import SamplingBody, check_model, chunk_stream, new_id, room_for, token_text, usage_of
from fate_moe.serve.parsing import Text
from fate_moe.serve.prompt import Prompt, plain_prompt
from fate_moe.serve.service import Serving
from fate_moe.serve.wire import JsonRoute, event_stream, unless_short

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)

_DEFAULT_TOKENS = 16  # OpenAI's
_MOST_PROMPTS = 64
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class CompletionRequest(SamplingBody):
    """The body of a request for text. ``prompt``: a text, token ids, or several of either."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1)

    @property
    def length(self) -> int:
        """Characters, or tokens, of all prompts."""
        return (
            len(self.prompt)
            if isinstance(self.prompt, str)
            else sum(1 if isinstance(one, int) else len(one) for one in self.prompt)
        )

    def prompts(self, card: ModelCard) -> list[Prompt]:
        """All prompts. Raises ApiError for none, or for too many."""
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [plain_prompt(card, given)]  # type: ignore[arg-type]
        if not given or len(given) > _MOST_PROMPTS:
            raise ApiError(f"'prompt' must be a text, or a list of 1 to {_MOST_PROMPTS}", "prompt", "invalid_value")
        return [plain_prompt(card, one) for one in given]  # type: ignore[arg-type]

    def plans(self, card: ModelCard, prompts: Sequence[Prompt]) -> list[Plan]:
        """One for each prompt and each of its ``n`` texts. Raises ApiError for what cannot be honoured."""
        if self.suffix:
            raise unsupported("suffix", "is not supported: this model does not fill in")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "is not supported other than equal to 'n'")
        wanted = _DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
        if wanted == 0 and not self.echo:
            raise ApiError("'max_tokens' of 0 needs 'echo': true", "max_tokens", "invalid_value")
        return [
            Plan(
                TextRequest(
                    prompt.tokens,
                    room_for(card, len(prompt.tokens), wanted, "prompt"),
                    self.sampling(card, index),
                    stop=self.stops,
                    ignore_eos=bool(self.ignore_eos),
                    top_logprobs=self.logprobs,
                    prompt_logprobs=bool(self.echo) and self.logprobs is not None,
                    continues=True,
                )
            )
            for prompt in prompts
            for index in range(self.n or 1)
        ]


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest, service: Serving) -> Response:
    """Continue a text, whole or as a stream."""
    card = service.model()
    check_model(card, body.model)
    includes_usage = body.includes_usage
    prompts = await unless_short(body.length, body.prompts, card)
    answers = Answers(service, body.plans(card, prompts))
    echoed = [prompt.text if body.echo else "" for prompt in prompts for _ in range(body.n or 1)]
    head = {"id": new_id("cmpl"), "object": "text_completion", "created": now(), "model": card.name}
    if body.stream:
        usage = functools.partial(_usage, n=body.n or 1) if includes_usage else None
        events = chunk_stream(answers, head, _chunks(card, echoed, body.logprobs), usage)
        return event_stream(events, answers.cancel, lambda: answers.status, service.options.keep_alive_seconds)
    try:
        whole = await collect(request, answers)
    except ClientGoneError:
        return Response(status_code=499)
    return JSONResponse(
        {
            **head,
            "choices": [
                _choice(card, index, answer, echoed[index], body.logprobs, bool(body.echo)) for index, answer in enumerate(whole)
            ],
            "usage": _usage([answer.end.finished for answer in whole], body.n or 1),
            "timings": whole[-1].end.finished.timings.as_dict(),
        }
    )


def _choice(card: ModelCard, index: int, answer: Answer, echoed: str, top: int | None, echo: bool) -> dict[str, Any]:
    tokens = [*(answer.end.finished.prompt if echo else ()), *answer.tokens]
    return {
        "index": index,
        "text": echoed + answer.text,
        "logprobs": None if top is None else _logprobs(card, tokens, 0),
        "finish_reason": answer.end.reason,
    }


def _chunks(card: ModelCard, echoed: Sequence[str], top: int | None) -> Callable[[Said | Done], Iterator[dict[str, Any]]]:
    """What turns events into chunks of the stream, for one request."""
    sent = [0] * len(echoed)  # characters of each text

    def chunk(index: int, text: str, tokens: Sequence[TokenRecord], reason: str | None = None, **more: Any) -> dict[str, Any]:
        logprobs = None if top is None or not tokens else _logprobs(card, tokens, sent[index])
        sent[index] += len(text)
        return {"choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}], **more}

    def chunks(event: Said | Done) -> Iterator[dict[str, Any]]:
        if echoed[event.index] and not sent[event.index]:
            yield chunk(event.index, echoed[event.index], ())
        if isinstance(event, Done):
            yield chunk(event.index, "", (), event.reason, timings=event.finished.timings.as_dict())
        else:
            yield chunk(event.index, "".join(delta.text for delta in event.deltas if isinstance(delta, Text)), event.tokens)

    return chunks


def _usage(ends: Sequence[Finished], n: int) -> dict[str, Any]:
    """Usage over several prompts, each of which was asked for ``n`` texts and counts once."""
    usage = usage_of(ends)
    prompt = sum(end.usage.prompt_tokens for end in ends[::n])
    return {**usage, "prompt_tokens": prompt, "total_tokens": prompt + usage["completion_tokens"]}


def _logprobs(card: ModelCard, tokens: Sequence[TokenRecord], offset: int) -> dict[str, Any]:
    """In this API's shape, which names tokens by their text; ``offset`` is where the first begins in the whole text."""
    texts = [token_text(card, record.token) for record in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [record.logprob for record in tokens],
        "top_logprobs": [_top(card, record) for record in tokens],
        "text_offset": offsets,
    }


def _top(card: ModelCard, record: TokenRecord) -> dict[str, float] | None:
    """Of tokens with one text (parts of characters) the likeliest counts."""
    if record.logprob is None:
        return None
    top: dict[str, float] = {}
    for token, logprob in record.top:
        top.setdefault(token_text(card, token), logprob)
    return top
