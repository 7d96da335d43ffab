"""From messages to token ids: the model's chat template, or a plain stated one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fate_moe.serve.card import ModelCard
from fate_moe.serve.errors import ApiError

__all__ = ["PLAIN_STOP", "PLAIN_TEMPLATE", "Prompt", "plain_prompt", "render", "template_kind", "tools_by_system_message"]

# For a model without a chat template. It ends at the next "User:", which is no part of the answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOP = ("\nUser:",)
# For a template that has no place for tools.
_TOOLS = (
    "You can call these functions; each line is one, as JSON:\n{functions}\n"
    'To call one, write <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call> and nothing after it.'
)
_OURS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages", "tools"}


@dataclass(frozen=True)
class Prompt:
    """``text`` is what ``tokens`` say; ``stop`` are stop strings that belong to the template."""

    tokens: tuple[int, ...]
    text: str
    stop: tuple[str, ...] = ()


def template_kind(card: ModelCard) -> str:
    """ "model": its own chat template, "plain": the stated one."""
    return "plain" if card.chat_template is None else "model"


def tools_by_system_message(card: ModelCard) -> bool:
    """Whether the template has no place for tools, so that a system message lists them."""
    return "tools" not in (card.chat_template or "")


def render(
    card: ModelCard,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
    continue_final: bool = False,
) -> Prompt:
    """The prompt of a conversation. ``messages`` and ``tools`` are in OpenAI's shape with text contents and parsed arguments,
    ``options`` go to the template, ``continue_final``: the answer continues the last message. Raises ApiError for what the template
    refuses.
    """
    for name in options or {}:
        if name in _OURS:
            raise ApiError(f"'{name}' cannot be set by chat_template_kwargs", "chat_template_kwargs", "invalid_value")
    if tools and tools_by_system_message(card):
        messages, tools = _with_tools(messages, tools), ()
    if card.chat_template is None:
        messages = [_plain(message) for message in messages]
    try:
        with card.lock:
            text = card.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=PLAIN_TEMPLATE if card.chat_template is None else None,
                add_generation_prompt=not continue_final,
                continue_final_message=continue_final,
                tokenize=False,
                **(options or {}),
            )
    except Exception as error:  # whatever a template raises for messages that it was not written for
        raise ApiError(f"the model's chat template refuses these messages: {error}", "messages", "invalid_value") from error
    # A template writes its special tokens out, a beginning of text among them where the model wants one.
    tokens = card.encode(text, special=card.chat_template is None)
    return Prompt(tuple(tokens), text, PLAIN_STOP if card.chat_template is None else ())


def plain_prompt(card: ModelCard, prompt: str | Sequence[int], param: str = "prompt") -> Prompt:
    """A text or token ids as they are. Raises ApiError for ids that the model does not have."""
    if isinstance(prompt, str):
        return Prompt(tuple(card.encode(prompt, special=True)), prompt)
    if (wrong := next((token for token in prompt if not 0 <= token < card.vocab_size), None)) is not None:
        raise ApiError(f"'{param}': there is no token {wrong}; ids go from 0 to {card.vocab_size - 1}", param, "invalid_value")
    return Prompt(tuple(prompt), card.decode(list(prompt)))


def _with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    text = _TOOLS.format(functions="\n".join(json.dumps(tool["function"]) for tool in tools))
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls of tools are part of its text."""
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls") or ()]
    return {**message, "content": message["content"] + "".join(f"<tool_call>{call}</tool_call>" for call in calls)}
