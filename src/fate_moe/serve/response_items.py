"""What a conversation consists of in OpenAI's responses API, and how chat templates have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fate_moe.serve.errors import ApiError, unsupported
from fate_moe.serve.messages import FunctionName, parsed_arguments, unlike_names
from fate_moe.serve.wire import Body

__all__ = ["Item", "ResponseTool", "as_messages", "as_tools"]


class InputPart(Body):
    """A part of a message: text. Others are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    image_url: Any = None
    file_id: Any = None
    detail: Any = None


class MessageItem(Body):
    """A message; those of the assistant may be sent as they came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Body):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None
    status: str | None = None


class CallOutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]
    id: str | None = None
    status: str | None = None


class ReasoningItem(Body):
    """What the assistant thought."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[InputPart] | None = None
    content: list[InputPart] | None = None
    encrypted_content: None = None
    status: str | None = None


def _kind(value: Any) -> Any:
    return value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class ResponseTool(Body):
    """A function that may be called; other tools run on OpenAI's machines."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: None = Field(None)


def as_tools(tools: Sequence[ResponseTool]) -> list[dict[str, Any]]:
    """As templates and grammars take them. Raises ApiError for two of one name."""
    return unlike_names([{"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})} for tool in tools])


def as_messages(given: str | Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """As chat templates take them: an assistant's reasoning, text and calls are one message. Raises ApiError for images."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not given:
        raise ApiError("'input' is empty", "input", "invalid_value")
    turn: dict[str, Any] | None = None  # the assistant's, while it lasts
    for index, item in enumerate(given):
        where = f"input.{index}"
        is_assistants = isinstance(item, CallItem | ReasoningItem) or (isinstance(item, MessageItem) and item.role == "assistant")
        if not is_assistants:
            turn = None
        elif turn is None:
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        if isinstance(item, ReasoningItem) and turn is not None:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(item.content or (), f"{where}.content")
        elif isinstance(item, CallItem) and turn is not None:
            function = {"name": item.name, "arguments": parsed_arguments(item.arguments)}
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
        elif isinstance(item, CallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, f"{where}.output")})
        elif isinstance(item, MessageItem):
            text = _text(item.content, f"{where}.content")
            if turn is not None:
                turn["content"] += text
            else:
                messages.append({"role": "system" if item.role == "developer" else item.role, "content": text})
    return messages


def _text(content: str | Sequence[InputPart], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        if part.type not in ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"):
            raise unsupported(f"{where}.{number}", f"is of the type {part.type[:40]!r}; this server reads text only")
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise ApiError(f"'{where}.{number}.text' is missing", f"{where}.{number}.text", "missing_required_parameter")
        texts.append(text)
    return "\n".join(texts)
