"""``/v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from fate_moe.serve.answers import Answers, ClientGoneError, Done, Said, Waiting
from fate_moe.serve.anthropic_body import CountRequest, MessagesRequest
from fate_moe.serve.blocks import Block, Blocks, collect_blocks
from fate_moe.serve.conversation import plan
from fate_moe.serve.errors import ApiError, error_body
from fate_moe.serve.messages import parsed_arguments
from fate_moe.serve.openai_common import check_model, new_id
from fate_moe.serve.prompt import render
from fate_moe.serve.service import Serving
from fate_moe.serve.wire import JsonRoute, comment, event_stream, joined, sse

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/messages", response_model=None)
async def messages(request: Request, body: MessagesRequest, service: Serving) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    card = service.model()
    check_model(card, body.model)
    plans = await plan(card, body.conversation(card))
    answers = Answers(service, plans)
    head = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": card.name}
    own_stops = tuple(body.stop_sequences or ())
    if body.stream:
        events = _stream(answers, head, len(plans[0].request.prompt), own_stops)
        return event_stream(events, answers.cancel, lambda: answers.status, service.options.keep_alive_seconds)
    try:
        blocks, done = await collect_blocks(request, answers)
    except ClientGoneError:
        return Response(status_code=499)
    end = done.finished
    return JSONResponse(
        {
            **head,
            "content": [_whole(block) for block in blocks.blocks],
            **_stop(done, own_stops),
            "usage": _usage(end.usage.prompt_tokens, end.usage.completion_tokens, end.usage.cached_tokens),
            "timings": end.timings.as_dict(),
        }
    )


@router.post("/v1/messages/count_tokens", response_model=None)
async def count_tokens(body: CountRequest, service: Serving) -> dict[str, int]:
    """How many tokens the prompt of a conversation has."""
    card = service.model()
    check_model(card, body.model)
    asked = body.conversation(card)
    tools = asked.tools if asked.choice != "none" else ()
    prompt = await run_in_threadpool(render, card, asked.messages, tools, asked.template_options, asked.continue_final)
    return {"input_tokens": len(prompt.tokens)}


async def _stream(answers: Answers, head: dict[str, Any], prompt_tokens: int, own_stops: tuple[str, ...]) -> AsyncIterator[bytes]:
    def event(kind: str, **fields: Any) -> ServerSentEvent:
        return sse({"type": kind, **fields}, kind)

    def events(said: Waiting | Said | Done) -> Iterator[ServerSentEvent]:
        if isinstance(said, Waiting):
            yield comment(said.status)
            return
        for what, block, text in blocks.feed(said) if isinstance(said, Said) else blocks.end():
            if what == "open":
                yield event("content_block_start", index=block.index, content_block=_empty(block))
            elif what == "grow":
                yield event("content_block_delta", index=block.index, delta=_delta(block, text))
            else:
                yield event("content_block_stop", index=block.index)
        if isinstance(said, Done):
            end = said.finished
            usage = _usage(end.usage.prompt_tokens, end.usage.completion_tokens, end.usage.cached_tokens)
            yield event("message_delta", delta=_stop(said, own_stops), usage=usage, timings=end.timings.as_dict())
            yield event("message_stop")

    start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(prompt_tokens, 0)}
    blocks = Blocks()
    try:
        yield joined([event("message_start", message=start)])
        async for batch in answers.batches():
            if now_said := joined(one for said in batch for one in events(said)):
                yield now_said
    except ApiError as error:
        yield joined([sse(error_body("/v1/messages", error), "error")])


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _object(block.text)}


def _empty(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": ""}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text_delta", "text": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "input_json_delta", "partial_json": text}


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; of one that was cut off, what there is under the key of a text."""
    value = parsed_arguments(arguments)
    return value if isinstance(value, dict) else {"text": value}


def _stop(done: Done, own_stops: tuple[str, ...]) -> dict[str, Any]:
    """Why the answer ended."""
    stop = done.finished.stop if done.finished.stop in own_stops else None
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[done.reason]
    return {"stop_reason": "stop_sequence" if stop is not None else reason, "stop_sequence": stop}


def _usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": prompt - cached,
        "output_tokens": completion,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }
