"""OpenAI's responses API, by OpenAI's package."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.serve.test_openai import WEATHER, error_of

pytestmark = pytest.mark.slow

TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]


def ask(client: openai.OpenAI, **options: Any) -> Any:
    usual = {"model": "embedded", "input": "Tell me of the sea.", "max_output_tokens": 12, "extra_body": {"seed": 1}}
    return client.responses.create(**{**usual, **options})


def test_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    whole = ask(client)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (whole.usage.output_tokens, whole.usage.input_tokens_details.cached_tokens) == (12, 0)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert events[-1].response.output_text == whole.output_text


def test_a_conversation_of_items(client: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "The weather?"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"role": "developer", "content": "Be short."},
    ]
    first = ask(client, input=items, instructions="You speak of the weather.", tools=TOOLS, tool_choice="none")
    again = ask(client, input=[*items, *first.output, {"role": "user", "content": "More."}])
    assert again.status == "incomplete"


def test_forced_calls(client: openai.OpenAI) -> None:
    options = {"tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 100}
    whole = ask(client, **options)
    assert whole.status == "completed"
    call = whole.output[0]
    assert (call.type, set(json.loads(call.arguments))) == ("function_call", {"city", "days"})
    events = list(ask(client, **options, stream=True))
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(parts) == call.arguments
    assert len(parts) > 1


def test_answers_of_a_schema(client: openai.OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "weather", "schema": WEATHER}}
    whole = ask(client, text=form, max_output_tokens=100)
    assert set(json.loads(whole.output_text)) == {"city", "days"}
    assert ask(client, text={"format": {"type": "json_object"}}, max_output_tokens=3).output_text.startswith("{")


def test_logprobs(client: openai.OpenAI) -> None:
    whole = ask(client, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=4)
    found = whole.output[0].content[0].logprobs
    assert [len(token.top_logprobs) for token in found] == [2] * 4


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": ""}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": ""}]}, "input.0.call_id"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"input": "word " * 3000}, "input"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, options: Any, param: str) -> None:
    error = error_of(lambda: ask(client, **options))
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param
