"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from fate_moe.serve.answers import Answer, Answers, ClientGoneError, Done, Said, collect, now
from fate_moe.serve.card import ModelCard
from fate_moe.serve.conversation import Conversation, plan, thinking_options
from fate_moe.serve.errors import ApiError
from fate_moe.serve.messages import Message, NamedTool, Tool, ToolChoice, chosen_tool, to_template, tool_dicts
from fate_moe.serve.openai_common import SamplingBody, chat_logprobs, check_model, chunk_stream, new_id, usage_of
from fate_moe.serve.parsing import Reasoning, Text, ToolArguments, ToolOpened
from fate_moe.serve.service import Serving
from fate_moe.serve.wire import Body, JsonRoute, event_stream

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
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        choice, tool = chosen_tool(tools, self.tool_choice if isinstance(self.tool_choice, str) else None, named)
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
        head["object"] = "chat.completion.chunk"
        events = chunk_stream(answers, head, _chunks(card, bool(body.logprobs)), usage_of if includes_usage else None)
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


def _chunks(card: ModelCard, logprobs: bool) -> Callable[[Said | Done], Iterator[dict[str, Any]]]:
    """What turns events into chunks of the stream, for one request."""
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, said: Any = None, **more: Any) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": delta, "logprobs": said, "finish_reason": reason}], **more}

    def chunks(event: Said | Done) -> Iterator[dict[str, Any]]:
        if event.index not in begun:
            begun.add(event.index)
            yield chunk(event.index, {"role": "assistant", "content": ""})
        if isinstance(event, Done):
            yield chunk(event.index, {}, event.reason, timings=event.finished.timings.as_dict())
            return
        said = chat_logprobs(card, event.tokens) if logprobs and event.tokens else None
        for delta in _deltas(event) or ([{}] if said else []):
            yield chunk(event.index, delta, said=said)
            said = None

    return chunks


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
