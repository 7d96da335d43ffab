"""Anthropic's package against the embedded model."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from tests.serve.test_openai import WEATHER

pytestmark = pytest.mark.slow

TOOLS: list[Any] = [
    {"name": "weather", "description": "The weather.", "input_schema": WEATHER, "cache_control": {"type": "ephemeral"}},
    {"name": "now", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
]


def ask(claude: anthropic.Anthropic, **options: Any) -> Any:
    messages = [{"role": "user", "content": "Tell me of the sea."}]
    extra = {"temperature": 0, **options.pop("extra_body", {})}  # the package has no such parameter any more
    return claude.messages.create(**{"model": "embedded", "max_tokens": 12, "messages": messages, "extra_body": extra, **options})


def test_whole_and_streamed_say_the_same(claude: anthropic.Anthropic) -> None:
    whole = ask(claude)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 12)
    events = list(ask(claude, stream=True))
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == whole.content[0].text
    kinds = [event.type for event in events if event.type != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert events[0].message.usage.input_tokens == whole.usage.input_tokens
    with claude.messages.stream(
        model="embedded",
        max_tokens=12,
        messages=[{"role": "user", "content": "Tell me of the sea."}],
        extra_body={"temperature": 0},
    ) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert final.usage.output_tokens == 12


def test_stop_sequences(claude: anthropic.Anthropic) -> None:
    whole = ask(claude, max_tokens=40).content[0].text
    stop = whole[6:10]
    stopped = ask(claude, max_tokens=40, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == whole[: whole.find(stop)]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_forced_calls(claude: anthropic.Anthropic, choice: Any) -> None:
    whole = ask(claude, tools=TOOLS, tool_choice=choice, max_tokens=100)
    assert whole.stop_reason == "tool_use"
    call = whole.content[0]
    assert call.input == {} if call.name == "now" else set(call.input) == {"city", "days"}
    events = list(ask(claude, tools=TOOLS, tool_choice=choice, max_tokens=100, stream=True))
    parts = [event.delta.partial_json for event in events if event.type == "content_block_delta"]
    assert json.loads("".join(parts)) == call.input


def test_a_conversation_with_tools(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "The weather?", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome", "days": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be short."}]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = ask(claude, messages=messages, system=system, tools=TOOLS, tool_choice={"type": "none"}, thinking=thinking)
    counted = claude.messages.count_tokens(model="embedded", messages=messages, system="Be short.")
    assert answer.usage.input_tokens == counted.input_tokens > 20
    more = claude.messages.count_tokens(model="embedded", messages=messages, system="Be short.", tools=TOOLS)
    assert more.input_tokens > counted.input_tokens


def test_an_answer_that_was_begun_goes_on(claude: anthropic.Anthropic) -> None:
    begun = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "Once upon a"}]
    plain = ask(claude, messages=begun, max_tokens=2).content[0].text
    assert not plain.startswith("Assistant")
    counted = claude.messages.count_tokens(model="embedded", messages=begun)  # type: ignore[arg-type]
    again = claude.messages.count_tokens(model="embedded", messages=begun[:1])  # type: ignore[arg-type]
    assert counted.input_tokens > again.input_tokens


def test_answers_of_a_schema(claude: anthropic.Anthropic) -> None:
    form = {"format": {"type": "json_schema", "schema": WEATHER}}
    whole = ask(claude, output_config=form, max_tokens=100)
    assert set(json.loads(whole.content[0].text)) == {"city", "days"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"foo": 1}, "foo"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "1024"),
        ({"output_config": {"effort": "high"}}, "effort"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(claude: anthropic.Anthropic, options: Any, word: str) -> None:
    known = {"messages", "tools", "tool_choice", "output_config"}
    extra = {key: value for key, value in options.items() if key not in known}
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(claude, **{key: value for key, value in options.items() if key in known}, extra_body=extra)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert word in body["error"]["message"]


def test_models(claude: anthropic.Anthropic) -> None:
    lenient = anthropic.Anthropic(base_url=claude.base_url, api_key="none", max_retries=0)  # what a model can do is not said
    (model,) = lenient.models.list()
    assert (model.id, model.type, model.display_name) == ("embedded", "model", "embedded")
    assert lenient.models.retrieve("embedded").created_at == model.created_at
    assert model.created_at.tzinfo is not None


def test_other_models_are_not_found(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        ask(claude, model="claude-5")
