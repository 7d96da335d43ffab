"""From a conversation, in whatever API, to plans: prompt, grammar, and how the answer is read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fate_moe.schedule.request import Request, Sampling
from fate_moe.serve.answers import Plan
from fate_moe.serve.card import ModelCard
from fate_moe.serve.constraint import call_grammar, constraint, json_grammar
from fate_moe.serve.errors import unsupported
from fate_moe.serve.openai_common import room_for
from fate_moe.serve.parsing import ForcedCall, PlainReader, Reader, TemplateReader, response_template
from fate_moe.serve.prompt import render, tools_by_system_message
from fate_moe.serve.wire import unless_short

__all__ = ["Conversation", "plan", "thinking_options"]


@dataclass(frozen=True)
class Conversation:
    """What an API asks for. ``messages`` and ``tools`` as templates take them; ``choice`` and ``tool`` as ``chosen_tool`` says;
    ``schema``: the answer is JSON of it; ``samplings``: one for each answer; ``names`` are the API's own words for its parameters.
    """

    messages: Sequence[Mapping[str, Any]]
    samplings: Sequence[Sampling]
    max_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    choice: Literal["none", "auto", "forced"] = "none"
    tool: str | None = None
    single_call: bool = False
    schema: Mapping[str, Any] | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    def name(self, param: str) -> str:
        return self.names.get(param, param)


async def plan(card: ModelCard, conversation: Conversation) -> list[Plan]:
    """The plans of all answers. Raises ApiError for what cannot be done. Long prompts are read beside the event loop, and grammars
    made there."""
    is_plain = not conversation.tools and conversation.schema is None
    length = sum(len(message["content"]) for message in conversation.messages)
    return await unless_short(length if is_plain else sys.maxsize, _plan, card, conversation)


def _plan(card: ModelCard, asked: Conversation) -> list[Plan]:
    tools = list(asked.tools) if asked.choice != "none" else []
    if asked.schema is not None and asked.choice == "forced":
        raise unsupported(asked.name("response_format"), "cannot be kept by an answer that must call a tool; omit one of them")
    prompt = render(card, asked.messages, tools, asked.template_options, asked.continue_final)
    room = room_for(card, len(prompt.tokens), asked.max_tokens, asked.name("messages"))
    grammar: Callable[[], Any] | None = None
    reader: Callable[[], Reader] = functools.partial(PlainReader, strip=card.chat_template is None)
    keep_special = False
    if asked.choice == "forced":
        grammar = constraint(card, call_grammar(tools, asked.tool), len(prompt.tokens), asked.name("tools"))
        reader = functools.partial(ForcedCall, asked.tool)
    elif asked.schema is not None:
        grammar = constraint(card, json_grammar(asked.schema), len(prompt.tokens), asked.name("response_format"))
    elif (template := response_template(card, bool(tools) and tools_by_system_message(card))) is not None:
        reader = functools.partial(TemplateReader, template, prompt.text, tools)
        keep_special = True
    return [
        Plan(
            Request(
                prompt.tokens,
                room,
                sampling,
                stop=() if asked.choice == "forced" else (*asked.stop, *prompt.stop),
                ignore_eos=asked.ignore_eos and grammar is None,
                top_logprobs=asked.top_logprobs,
                keep_special=keep_special,
                constraint=grammar,
            ),
            reader,
            asked.single_call,
        )
        for sampling in asked.samplings
    ]


def thinking_options(card: ModelCard, effort: str | None, param: str) -> dict[str, Any]:
    """What a chat template is told of how much to think. Raises ApiError where it knows no such thing."""
    template = card.chat_template or ""
    if effort is None:
        return {}
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template:
        return {"enable_thinking": effort != "none"}
    if effort == "none" and "<think>" not in template:
        return {}
    raise unsupported(param, "is nothing that this model's chat template knows")
