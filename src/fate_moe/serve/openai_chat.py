"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from fate_moe.serve.answers import Answer, Answers, ClientGoneError, Done, Said, Waiting, collect, now
from fate_moe.serve.card import ModelCard
from fate_moe.serve.conversation import Conversation, plan, thinking_options
from fate_moe.serve.errors import ApiError, error_body
from fate_moe.serve.messages import Message, Tool, ToolChoice, chosen_tool, to_template, tool_dicts
from fate_moe.serve.openai_common import SamplingBody, chat_logprobs, check_model, new_id, usage_of
from fate_moe.serve.parsing import Reasoning, Text, ToolArguments, ToolOpened
from fate_moe.serve.service import Serving
from fate_moe.serve.wire import Body, JsonRoute, comment, event_stream, sse

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


class JsonSchema(Body):
    """A schema that the answer keeps."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatRequest(SamplingBody):
    """The body of a request for a chat answer."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Format | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def conversation(self, card: ModelCard) -> Conversation:
        """What is asked for. Raises ApiError for what does not go together."""
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError("'max_tokens' and 'max_completion_tokens' differ; give one of them", "max_tokens", "invalid_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("'top_logprobs' needs 'logprobs': true", "top_logprobs", "invalid_value")
        tools = tool_dicts(self.tools)
        choice, tool = chosen_tool(tools, self.tool_choice)
        return Conversation(
            messages=to_template(self.messages),
            samplings=[self.sampling(card, index) for index in range(self.n or 1)],
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            tools=tools,
            choice=choice,
            tool=tool,
            single_call=self.parallel_tool_calls is False,
            schema=schema_of(self.response_format),
            stop=self.stops,
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            template_options={
                **thinking_options(card, self.reasoning_effort, "reasoning_effort"),
                **(self.chat_template_kwargs or {}),
            },
        )


def schema_of(given: TextFormat | ObjectFormat | SchemaFormat | None) -> dict[str, Any] | None:
    """The schema that an answer has to keep; None: any text."""
    if isinstance(given, SchemaFormat):
        return given.json_schema.schema_
    return {"type": "object"} if isinstance(given, ObjectFormat) else None


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest, service: Serving) -> Response:
    """Answer a conversation, whole or as a stream."""
    card = service.model()
    check_model(card, body.model)
    includes_usage = body.includes_usage
    answers = Answers(service, await plan(card, body.conversation(card)))
    head = {"id": new_id("chatcmpl"), "created": now(), "model": card.name}
    if body.stream:
        events = _stream(card, answers, head, bool(body.logprobs), includes_usage)
        return event_stream(events, answers.cancel, lambda: answers.status, service.options.keep_alive_seconds)
    try:
        whole = await collect(request, answers)
    except ClientGoneError:
        return Response(status_code=499)
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [_choice(card, index, answer, bool(body.logprobs)) for index, answer in enumerate(whole)],
            "usage": usage_of([answer.end.finished for answer in whole]),
            "timings": whole[-1].end.finished.timings.as_dict(),
        }
    )


def _choice(card: ModelCard, index: int, answer: Answer, logprobs: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text if answer.text or not answer.calls else None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(card, answer.tokens) if logprobs else None,
        "finish_reason": answer.end.reason,
    }


async def _stream(
    card: ModelCard, answers: Answers, head: dict[str, Any], logprobs: bool, includes_usage: bool
) -> AsyncIterator[ServerSentEvent]:
    head = {**head, "object": "chat.completion.chunk"}
    usage: dict[str, Any] = {"usage": None} if includes_usage else {}
    ends: list[Done] = []
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> ServerSentEvent:
        choice = {"index": index, "delta": delta, "logprobs": more.pop("logprobs", None), "finish_reason": reason}
        return sse({**head, "choices": [choice], **usage, **more})

    try:
        async for event in answers.events():
            if isinstance(event, Waiting):
                yield comment(event.status)
                continue
            if event.index not in begun:
                begun.add(event.index)
                yield chunk(event.index, {"role": "assistant", "content": ""})
            if isinstance(event, Done):
                ends.append(event)
                yield chunk(event.index, {}, event.reason, timings=event.finished.timings.as_dict())
                continue
            said = chat_logprobs(card, event.tokens) if logprobs and event.tokens else None
            deltas = _deltas(event)
            for delta in deltas or ([{}] if said else []):
                yield chunk(event.index, delta, logprobs=said)
                said = None
        if includes_usage:
            yield sse({**head, "choices": [], "usage": usage_of([end.finished for end in ends])})
        yield sse("[DONE]")
    except ApiError as error:
        yield sse(error_body("/v1/chat/completions", error))


def _deltas(said: Said) -> Sequence[dict[str, Any]]:
    """What is new, in the API's words."""
    found: list[dict[str, Any]] = []
    for delta in said.deltas:
        if isinstance(delta, Text):
            found.append({"content": delta.text})
        elif isinstance(delta, Reasoning):
            found.append({"reasoning_content": delta.text})
        elif isinstance(delta, ToolOpened):
            function = {"name": delta.name, "arguments": ""}
            found.append({"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]})
        elif isinstance(delta, ToolArguments):
            found.append({"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]})
    return found
