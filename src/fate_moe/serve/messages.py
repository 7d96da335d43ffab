"""Conversations as OpenAI's chat API has them, and the tools in it: checked, and made into what templates take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from fate_moe.serve.errors import ApiError, unsupported
from fate_moe.serve.wire import Body

__all__ = [
    "FunctionName",
    "Message",
    "NamedTool",
    "Tool",
    "ToolChoice",
    "chosen_tool",
    "parsed_arguments",
    "to_template",
    "tool_dicts",
    "unlike_names",
]

FunctionName = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Part(Body):
    """A part of a message: text. Others are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    cache_control: Any = None


class FunctionCall(Body):
    """A function that the assistant called; ``arguments`` are JSON."""

    name: FunctionName
    arguments: str


class ToolCall(Body):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    """A message of a conversation. Fields that an answer has and that say nothing may be sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[None] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None


class Function(Body):
    """A function that the model may call. ``strict`` is kept where a call is forced, and asks for nothing elsewhere."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Body):
    """The function that has to be called."""

    name: FunctionName


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def to_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: text contents, parsed arguments. Raises ApiError for what is no text."""
    return [_one(message, f"messages.{index}") for index, message in enumerate(messages)]


def _one(message: Message, where: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    one: dict[str, Any] = {"role": role, "content": _text(message, where)}
    if message.name is not None:
        one["name"] = message.name
    if message.reasoning_content is not None:
        one["reasoning_content"] = message.reasoning_content
    if message.tool_calls is not None and message.role != "assistant":
        raise ApiError(f"'{where}.tool_calls': only the assistant calls tools", f"{where}.tool_calls", "invalid_value")
    if message.tool_calls:
        one["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": parsed_arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        if message.tool_call_id is None:
            raise ApiError(f"'{where}.tool_call_id' is missing", f"{where}.tool_call_id", "missing_required_parameter")
        one["tool_call_id"] = message.tool_call_id
    return one


def _text(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role != "assistant":
            raise ApiError(f"'{where}.content' is missing", f"{where}.content", "missing_required_parameter")
        return ""
    texts = []
    for number, part in enumerate(message.content):
        text = part.text if part.type == "text" else part.refusal if part.type == "refusal" else None
        if text is None:
            if part.type in ("text", "refusal"):
                name = f"{where}.content.{number}.{part.type}"
                raise ApiError(f"'{name}' is missing", name, "missing_required_parameter")
            raise unsupported(f"{where}.content.{number}", f"is of the type {part.type[:40]!r}; this server reads text only")
        texts.append(text)
    return "\n".join(texts)


def parsed_arguments(text: str) -> dict[str, Any] | str:
    """The arguments of a call: the object that templates want, or the text where a model wrote no JSON object."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def tool_dicts(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools as templates and grammars take them. Raises ApiError for two of one name."""
    return unlike_names([tool.model_dump(exclude_none=True) for tool in tools or ()])


def unlike_names(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``tools``, if no two of them have the same name; else raises ApiError."""
    names = [tool["function"]["name"] for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ApiError(f"'tools': there are two of the name '{name}'", "tools", "invalid_value")
    return tools


def chosen_tool(
    tools: Sequence[dict[str, Any]], choice: Literal["none", "auto", "required"] | None, named: str | None = None
) -> tuple[Literal["none", "auto", "forced"], str | None]:
    """Whether tools are to be called, and which one (None: any). ``named``: the request names the tool, whatever ``choice``.

    Raises ApiError for a choice that ``tools`` do not offer.
    """
    if named is None and choice is None:
        return ("auto" if tools else "none"), None
    if named is None and choice == "none":
        return "none", None
    if not tools:
        raise ApiError("'tool_choice' needs 'tools'", "tool_choice", "invalid_value")
    names = [tool["function"]["name"] for tool in tools]
    if named is not None:
        if named not in names:
            raise ApiError(f"'tool_choice': there is no tool '{named}'", "tool_choice", "invalid_value")
        return "forced", named
    if choice == "required":
        return "forced", names[0] if len(names) == 1 else None
    return "auto", None
