"""``/v1/responses``: OpenAI's newer API. Nothing is stored: a conversation is sent whole each time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from fate_moe.schedule.request import Finished, Sampling
from fate_moe.serve.answers import Answers, ClientGoneError, Done, Said, Waiting, now
from fate_moe.serve.blocks import Block, Blocks, Step, collect_blocks
from fate_moe.serve.card import ModelCard
from fate_moe.serve.conversation import Conversation, plan, thinking_options
from fate_moe.serve.errors import ApiError
from fate_moe.serve.messages import chosen_tool
from fate_moe.serve.openai_common import chat_logprobs, check_model, greedy_if_tiny, new_id
from fate_moe.serve.response_items import Item, ResponseTool, as_messages, as_tools
from fate_moe.serve.service import Serving
from fate_moe.serve.wire import Body, JsonRoute, comment, event_stream, joined, sse

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


class TextFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """How the answer is written. ``verbosity`` other than medium is not supported."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Body):
    """How much the model thinks; its thoughts are given whole, never as a summary."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None


class ChosenFunction(Body):
    """The function that has to be called."""

    type: Literal["function"]
    name: str


class ResponseStreamOptions(Body):
    """What a stream carries beside the answer."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Body):
    """The body of a request for a response."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    store: Literal[False] | None = None
    # Of no effect on the answer, here as there.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ()) or self.top_logprobs is not None

    def conversation(self, card: ModelCard) -> Conversation:
        """What is asked for. Raises ApiError for what does not go together."""
        tools = as_tools(self.tools or ())
        named = self.tool_choice.name if isinstance(self.tool_choice, ChosenFunction) else None
        choice, tool = chosen_tool(tools, self.tool_choice if isinstance(self.tool_choice, str) else None, named)
        form = self.text.format if self.text is not None else None
        if form is not None and form.type == "json_schema" and form.schema_ is None:
            raise ApiError("'text.format.schema' is missing", "text.format.schema", "missing_required_parameter")
        return Conversation(
            messages=as_messages(self.input, self.instructions),
            samplings=[Sampling(greedy_if_tiny(self.temperature), self.top_p, seed=self.seed)],
            max_tokens=self.max_output_tokens,
            tools=tools,
            choice=choice,
            tool=tool,
            single_call=self.parallel_tool_calls is False,
            schema=None if form is None or form.type == "text" else form.schema_ or {"type": "object"},
            top_logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            template_options={
                **thinking_options(card, self.reasoning.effort if self.reasoning else None, "reasoning.effort"),
                **(self.chat_template_kwargs or {}),
            },
            names={"messages": "input", "response_format": "text.format"},
        )

    def echo(self) -> dict[str, Any]:
        """The parameters that an answer repeats."""
        given = self.model_dump(exclude_none=True, by_alias=True)
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [{"parameters": None, "strict": None, **tool} for tool in given.get("tools", [])],
            "tool_choice": given.get("tool_choice", "auto"),
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "text": given.get("text", {"format": {"type": "text"}}),
            "reasoning": given.get("reasoning", {"effort": None, "summary": None}),
            "metadata": self.metadata or {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }


@router.post("/v1/responses", response_model=None)
async def responses(request: Request, body: ResponseRequest, service: Serving) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    card = service.model()
    check_model(card, body.model)
    answers = Answers(service, await plan(card, body.conversation(card)))
    whole = _Whole(card, body)
    if body.stream:
        return event_stream(_stream(answers, whole), answers.cancel, lambda: answers.status, service.options.keep_alive_seconds)
    try:
        whole.blocks, whole.done = await collect_blocks(request, answers)
    except ClientGoneError:
        return Response(status_code=499)
    return JSONResponse(whole.response())


class _Whole:
    """A response as it grows."""

    def __init__(self, card: ModelCard, body: ResponseRequest) -> None:
        self.blocks = Blocks()
        self.done: Done | None = None
        self._card, self._logprobs = card, body.wants_logprobs
        self._head = {"id": new_id("resp"), "object": "response", "created_at": now(), "model": card.name, **body.echo()}
        self._ids: list[str] = []

    def response(self, error: ApiError | None = None) -> dict[str, Any]:
        """The response with all that is there."""
        status = "in_progress"
        incomplete = None
        if error is not None:
            status = "failed"
        elif self.done is not None:
            status = "completed" if self.done.reason != "length" else "incomplete"
            incomplete = None if self.done.reason != "length" else {"reason": "max_output_tokens"}
        return {
            **self._head,
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": incomplete,
            "output": [self.item(block, "completed") for block in self.blocks.blocks] if self.done else [],
            "usage": None if self.done is None else _usage(self.done.finished, self.blocks.reasoning_tokens),
            **({} if self.done is None else {"timings": self.done.finished.timings.as_dict()}),
        }

    def item(self, block: Block, status: str) -> dict[str, Any]:
        """A block as an output item; while it grows, its contents come as events."""
        cut = self.done is not None and self.done.reason == "length" and block is self.blocks.blocks[-1]
        head = {"id": self.item_id(block), "status": "incomplete" if cut else status}
        grows = status == "in_progress"
        if block.kind == "call":
            call = {"call_id": block.call_id, "name": block.name, "arguments": "" if grows else block.text}
            return {**head, "type": "function_call", **call}
        parts = [] if grows else [self.part(block)]
        if block.kind == "reasoning":
            return {**head, "type": "reasoning", "summary": [], "content": parts}
        return {**head, "type": "message", "role": "assistant", "content": parts}

    def part(self, block: Block, empty: bool = False) -> dict[str, Any]:
        """The only part of an item's contents."""
        text = "" if empty else block.text
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": [] if empty else self.logprobs(block.tokens)}

    def logprobs(self, tokens: Any) -> list[dict[str, Any]]:
        return list(chat_logprobs(self._card, tokens)["content"]) if self._logprobs else []

    def item_id(self, block: Block) -> str:
        """The name of a block's item: the same each time."""
        prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[block.kind]
        while len(self._ids) <= block.index:
            self._ids.append(new_id(prefix))
        return self._ids[block.index]


def _usage(end: Finished, reasoning_tokens: int) -> dict[str, Any]:
    usage = end.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


async def _stream(answers: Answers, whole: _Whole) -> AsyncIterator[bytes]:
    number = 0

    def event(kind: str, **fields: Any) -> ServerSentEvent:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number - 1, **fields}, kind)

    def events(said: Waiting | Said | Done) -> Iterator[ServerSentEvent]:
        if isinstance(said, Waiting):
            yield comment(said.status)
            return
        if isinstance(said, Said):
            for step in whole.blocks.feed(said):
                for kind, fields in _events(whole, step, said):
                    yield event(kind, **fields)
            return
        steps = list(whole.blocks.end())
        whole.done = said
        for step in steps:
            for kind, fields in _events(whole, step, None):
                yield event(kind, **fields)
        end = "response.incomplete" if said.reason == "length" else "response.completed"
        yield event(end, response=whole.response())

    try:
        yield joined([event(f"response.{state}", response=whole.response()) for state in ("created", "in_progress")])
        async for batch in answers.batches():
            if now_said := joined(one for said in batch for one in events(said)):
                yield now_said
    except ApiError as error:
        failed = event("error", code=error.code, message=error.message, param=error.param)
        yield joined([failed, event("response.failed", response=whole.response(error))])


def _events(whole: _Whole, step: Step, said: Said | None) -> list[tuple[str, dict[str, Any]]]:
    """One step of a block in the API's events."""
    what, block, text = step
    at = {"output_index": block.index, "item_id": whole.item_id(block)}
    in_part = {**at, "content_index": 0}
    name = {"text": "response.output_text", "reasoning": "response.reasoning_text", "call": "response.function_call_arguments"}
    kind = name[block.kind]
    if what == "open":
        added = ("response.output_item.added", {"output_index": block.index, "item": whole.item(block, "in_progress")})
        part = ("response.content_part.added", {**in_part, "part": whole.part(block, empty=True)})
        return [added] if block.kind == "call" else [added, part]
    if what == "grow":
        if block.kind == "call":
            return [(f"{kind}.delta", {**at, "delta": text})]
        more = {"logprobs": whole.logprobs(said.tokens if said else ())} if block.kind == "text" else {}
        return [(f"{kind}.delta", {**in_part, "delta": text, **more})]
    done = ("response.output_item.done", {"output_index": block.index, "item": whole.item(block, "completed")})
    if block.kind == "call":
        return [(f"{kind}.done", {**at, "name": block.name, "arguments": block.text}), done]
    more = {"logprobs": whole.logprobs(block.tokens)} if block.kind == "text" else {}
    return [
        (f"{kind}.done", {**in_part, "text": block.text, **more}),
        ("response.content_part.done", {**in_part, "part": whole.part(block)}),
        done,
    ]
