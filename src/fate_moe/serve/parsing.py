"""Splits what a model wrote into text, reasoning and calls of tools. The only place that knows how transformers parses answers.

``transformers.cli.serving.utils`` and ``transformers.utils.chat_parsing`` are private and move between minor versions. Where they
are missing, or fail on what a model wrote, the text is passed on as it is.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from fate_moe.serve.card import ModelCard

__all__ = [
    "Delta",
    "ForcedCall",
    "PlainReader",
    "Reader",
    "Reasoning",
    "TemplateReader",
    "Text",
    "ToolArguments",
    "ToolOpened",
    "response_template",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolOpened:
    """The call number ``index`` of this answer begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """More of the arguments (JSON) of call ``index``."""

    index: int
    text: str


Delta: TypeAlias = "Text | Reasoning | ToolOpened | ToolArguments"


class Reader(Protocol):
    """Turns the pieces of one answer into deltas; ``finish`` is called once, after the last piece."""

    def feed(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class PlainReader:
    """All is text; ``strip``: from the first character on that is no space."""

    def __init__(self, strip: bool = False) -> None:
        self._strip = strip

    def feed(self, text: str) -> list[Delta]:
        if self._strip:
            text = text.lstrip(" ")
            self._strip = not text
        return [Text(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class ForcedCall:
    """A call that a grammar forces: the arguments alone where ``name`` is known, else ``{"name": ..., "arguments": ...}``."""

    _HEAD = re.compile(r'\{"name": "((?:[^"\\]|\\.)*)", "arguments": ')

    def __init__(self, name: str | None) -> None:
        self._wraps = name is None
        self._opened = [ToolOpened(0, call_id(), name)] if name is not None else []
        self._head = ""
        self._held = ""

    def feed(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        if self._wraps and not self._opened:
            self._head += text
            if (match := self._HEAD.match(self._head)) is None:
                return []
            self._opened.append(ToolOpened(0, call_id(), match[1]))
            deltas, text = [self._opened[0]], self._head[match.end() :]
        elif not self._wraps and not self._head:
            deltas, self._head = [self._opened[0]], "done"
        text = self._held + text
        end = len(text.rstrip("}")) if self._wraps else len(text)  # the last brace closes the call, not its arguments
        end = max(end, len(text) - 1) if text.endswith("}") and self._wraps else end
        self._held = text[end:]
        return [*deltas, ToolArguments(0, text[:end])] if text[:end] else deltas

    def finish(self) -> list[Delta]:
        return []


class TemplateReader:
    """What a response template finds, by transformers' parser; ``prompt`` is the text of the prompt, ``tools`` the request's.

    A call that the parser cannot read, and all after it, is passed on as text.
    """

    def __init__(self, template: Mapping[str, Any], prompt: str, tools: Sequence[Mapping[str, Any]]) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        if template.get("start_anchor") == _ANCHOR:
            prompt = _ANCHOR + ("<think>" if prompt.rstrip().endswith("<think>") else "")
        self._parser: Any = ResponseParser(dict(template), prefix=prompt, tools=[dict(tool) for tool in tools] or None)
        self._calls = 0
        self._unread = ""  # the latest pieces, since a call began that has not ended

    def feed(self, text: str) -> list[Delta]:
        if self._parser is None:
            return [Text(text)]
        self._unread += text
        try:
            return self._deltas(self._parser.feed(text))
        except Exception as error:
            return self._give_up(error)

    def finish(self) -> list[Delta]:
        if self._parser is None:
            return []
        try:
            return self._deltas(self._parser.finalize()[1])
        except Exception as error:
            return self._give_up(error)

    def _deltas(self, events: list[dict[str, Any]]) -> list[Delta]:
        from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

        deltas: list[Delta] = []
        for chunk in response_events_to_chunks(events):
            if isinstance(chunk, ToolCall):
                deltas += [ToolOpened(self._calls, call_id(), chunk.name), ToolArguments(self._calls, chunk.arguments)]
                self._calls += 1
            else:
                deltas.append(Reasoning(str(chunk)) if isinstance(chunk, ReasoningText) else Text(chunk))
        inside = [event["type"] for event in events if event.get("field") == "tool_calls"]
        if (inside and inside[-1] == "region_close") or (deltas and "region_open" not in inside):
            self._unread = ""
        return deltas

    def _give_up(self, error: Exception) -> list[Delta]:
        _log.info("the answer is passed on as text: %s: %s", type(error).__name__, error)
        self._parser = None
        return [Text(self._unread)]


_ANCHOR = "\0"  # where an answer begins, for a template of ours: no prompt has it


# What many families write, for models that transformers has no template for: reasoning in <think>, calls as JSON in <tool_call>.
_THINK = {"open": "<think>", "close": "</think>", "content": "text"}
_CALLS = {
    "open_pattern": r"\s*<tool_call>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}


def response_template(card: ModelCard, calls_in_text: bool) -> Mapping[str, Any] | None:
    """How this model's answers are told apart: transformers' own, or a common one where its chat template shows the marks, or
    ``calls_in_text`` told the model to use them; None: all is text."""
    try:
        from transformers.cli.serving.utils import get_response_template
        from transformers.utils.chat_parsing import ResponseParser  # noqa: F401
    except ImportError as error:
        _log.warning("answers are passed on as text: this transformers parses none (%s)", error)
        return None
    try:
        template: Mapping[str, Any] | None = get_response_template(card.tokenizer, card.model)
    except Exception as error:
        _log.warning("answers are passed on as text: %s", error)
        return None
    if template is not None and card.chat_template is not None and not calls_in_text:
        return template
    fields: dict[str, Any] = {}
    if "<think>" in (card.chat_template or ""):
        fields["reasoning_content"] = _THINK
    if calls_in_text or "<tool_call>" in (card.chat_template or ""):
        fields["tool_calls"] = _CALLS
    fields["content"] = {"content": "text"}
    return {"defaults": {"role": "assistant"}, "start_anchor": _ANCHOR, "fields": fields} if len(fields) > 1 else None


def call_id() -> str:
    """A name for a call of a tool."""
    return f"call_{uuid.uuid4().hex[:24]}"
