"""Bodies of Anthropic's API, and how chat templates have them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fate_moe.schedule.request import Sampling
from fate_moe.serve.card import ModelCard
from fate_moe.serve.conversation import Conversation, thinking_options
from fate_moe.serve.errors import ApiError, unsupported
from fate_moe.serve.messages import FunctionName, chosen_tool, unlike_names
from fate_moe.serve.openai_common import MOST_STOPS, StopString, greedy_if_tiny
from fate_moe.serve.wire import Body

__all__ = ["CountRequest", "MessagesRequest"]


class ContentBlock(Body):
    """A part of a message: text, thinking, a call of a tool or what it gave. Others are refused by name. ``cache_control`` asks for
    nothing that would change an answer."""

    type: str
    text: str | None = None
    citations: Any = None
    cache_control: Any = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: FunctionName | None = None
    input: dict[str, Any] | None = None
    caller: Any = None
    toolset_name: None = None
    tool_use_id: str | None = None
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None
    source: Any = None
    title: Any = None
    context: Any = None


class AnthropicMessage(Body):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class AnthropicTool(Body):
    """A tool that the client runs; the others run on Anthropic's machines. Fields about caching and streaming have no effect."""

    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None
    input_examples: list[Any] | None = None


class AnthropicToolChoice(Body):
    """Which tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model may think. How long is up to the model: ``budget_tokens`` is accepted and has no effect."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    """A schema that the answer keeps."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the answer is made."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Body):
    """What makes a prompt."""

    model: str
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[ContentBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None

    def conversation(self, card: ModelCard) -> Conversation:
        """What is asked for. Raises ApiError for what does not go together."""
        tools = unlike_names([_tool(tool) for tool in self.tools or ()])
        choice, tool = self._choice(tools)
        config = self.output_config
        return Conversation(
            messages=self._messages(),
            samplings=[Sampling()],
            tools=tools,
            choice=choice,
            tool=tool,
            single_call=bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use),
            schema=config.format.schema_ if config is not None and config.format is not None else None,
            template_options=self._thinking(card),
            continue_final=self.messages[-1].role == "assistant",
            names={"response_format": "output_config.format"},
        )

    def _choice(self, tools: list[dict[str, Any]]) -> tuple[Literal["none", "auto", "forced"], str | None]:
        chosen = self.tool_choice
        if chosen is None or chosen.type == "auto":
            return chosen_tool(tools, None)
        if chosen.type == "tool":
            return chosen_tool(tools, None, _required(chosen.name, "tool_choice.name"))
        return chosen_tool(tools, "required" if chosen.type == "any" else "none")

    def _thinking(self, card: ModelCard) -> dict[str, Any]:
        """Options for the chat template; one that knows no thinking is told nothing, and permission to think is no error."""
        effort = self.output_config.effort if self.output_config is not None else None
        options = thinking_options(card, effort, "output_config.effort") if effort is not None else {}
        if self.thinking is not None and "enable_thinking" in (card.chat_template or ""):
            options["enable_thinking"] = self.thinking.type != "disabled"
        return options

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.system is not None and (system := _text(self.system, "system")):
            found.append({"role": "system", "content": system})
        for index, message in enumerate(self.messages):
            found += _message(message, f"messages.{index}")
        return found


class MessagesRequest(CountRequest):
    """The body of a request for a message."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 30)
    stop_sequences: list[StopString] | None = Field(None, max_length=MOST_STOPS)
    stream: bool | None = None
    # Of no effect on the answer, here as there.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def conversation(self, card: ModelCard) -> Conversation:
        asked = super().conversation(card)
        sampling = Sampling(greedy_if_tiny(self.temperature), self.top_p, self.top_k)
        more = {"samplings": [sampling], "max_tokens": self.max_tokens, "stop": tuple(self.stop_sequences or ())}
        return Conversation(**{**asked.__dict__, **more})


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.input_schema}}


def _message(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """A message of this API may be several of a template's: what tools gave comes before what the user says."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[str] = []
    results: list[dict[str, Any]] = []
    one: dict[str, Any] = {"role": message.role}
    for number, block in enumerate(message.content):
        at = f"{where}.content.{number}"
        if block.type == "text":
            texts.append(_required(block.text, f"{at}.text"))
        elif block.type == "thinking" and message.role == "assistant":
            one["reasoning_content"] = one.get("reasoning_content", "") + _required(block.thinking, f"{at}.thinking")
        elif block.type == "redacted_thinking" and message.role == "assistant":
            continue
        elif block.type == "tool_use" and message.role == "assistant":
            name, given = _required(block.name, f"{at}.name"), block.input or {}
            call = {"id": _required(block.id, f"{at}.id"), "type": "function", "function": {"name": name, "arguments": given}}
            one.setdefault("tool_calls", []).append(call)
        elif block.type == "tool_result" and message.role == "user":
            text = _text(block.content or "", f"{at}.content")
            text = f"Error: {text}" if block.is_error else text
            results.append({"role": "tool", "tool_call_id": _required(block.tool_use_id, f"{at}.tool_use_id"), "content": text})
        else:
            raise unsupported(at, f"is of the type {block.type[:40]!r}, which this server does not read from the {message.role}")
    one["content"] = "\n".join(texts)
    return [*results, one] if texts or not results or message.role == "assistant" else results


def _text(content: str | list[ContentBlock], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, block in enumerate(content):
        if block.type != "text":
            raise unsupported(f"{where}.{number}", f"is of the type {block.type[:40]!r}; this server reads text only")
        texts.append(_required(block.text, f"{where}.{number}.text"))
    return "\n".join(texts)


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise ApiError(f"'{name}' is missing", name, "missing_required_parameter")
    return value
