"""OpenAI's package against the embedded model: every answer is checked against the package's own schema."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from fate_moe.serve.service import Service

pytestmark = pytest.mark.slow

ASKED: list[Any] = [{"role": "user", "content": "Tell me of the sea."}]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "embedded", "messages": ASKED, "max_tokens": 16, "seed": 1, **options})


def text_of(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").owned_by == "fate-moe"


def test_chat_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    whole = chat(client)
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens_details.cached_tokens) == (16, 0)
    assert whole.timings["decode_tokens_per_second"] > 0
    assert {"ready_on_time", "bytes_read", "stall_seconds", "prompt_tokens_per_second"} <= set(whole.timings)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    drafts = {"completion_tokens_details"}  # depend on what was measured
    assert chunks[-1].usage.model_dump(exclude=drafts) == whole.usage.model_dump(exclude=drafts)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"


def test_two_answers_are_those_of_two_seeds(client: openai.OpenAI) -> None:
    both = [choice.message.content for choice in chat(client, n=2).choices]
    assert both == [chat(client).choices[0].message.content, chat(client, seed=2).choices[0].message.content]
    texts = ["", ""]
    for chunk in chat(client, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == both


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=40).choices[0].message.content
    stop = whole[5:9]
    stopped = chat(client, max_tokens=40, stop=[stop, "never"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.find(stop)], "stop")
    assert text_of(chat(client, max_tokens=40, stop=stop, stream=True)) == stopped.message.content


def test_greedy_is_repeatable_without_a_seed(client: openai.OpenAI) -> None:
    assert len({chat(client, seed=None, temperature=0).choices[0].message.content for _ in range(2)}) == 1


def test_logprobs(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=3, max_tokens=6).choices[0]
    tokens = whole.logprobs.content
    assert "".join(token.token for token in tokens).lstrip() == whole.message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    streamed = [
        token.logprob
        for chunk in chat(client, logprobs=True, top_logprobs=0, max_tokens=6, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert streamed == [token.logprob for token in tokens]


def test_logit_bias_and_penalties(client: openai.OpenAI, service: Service) -> None:
    assert service.card is not None
    token = service.card.encode(" sea", special=False)[0]
    assert chat(client, logit_bias={str(token): 100}, max_tokens=3).choices[0].message.content == "sea sea sea"
    other = chat(client, logit_bias={str(token): 30}, presence_penalty=2, frequency_penalty=2, max_tokens=12, temperature=0)
    assert other.choices[0].message.content.count("sea") < 12
    options = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    greedy = chat(client, temperature=0, extra_body={"repetition_penalty": 1.0}).choices[0].message.content
    assert chat(client, extra_body=options).choices[0].message.content == greedy


def test_answers_of_a_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    for seed in range(3):
        answer = json.loads(chat(client, response_format=form, seed=seed, max_tokens=100).choices[0].message.content)
        assert set(answer) == {"city", "days"}
        assert 1 <= answer["days"] <= 9
    streamed = text_of(chat(client, response_format=form, max_tokens=100, stream=True))
    assert streamed == chat(client, response_format=form, max_tokens=100).choices[0].message.content


def test_answers_that_are_json(client: openai.OpenAI) -> None:
    bias = {str(token): -100 for token in range(3, 20)}
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=60, logit_bias=bias).choices[0]
    assert answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_are_valid_even_from_a_model_that_knows_none(client: openai.OpenAI, choice: Any) -> None:
    whole = chat(client, tools=TOOLS, tool_choice=choice, max_tokens=100).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    call = whole.message.tool_calls[0].function
    arguments = json.loads(call.arguments)
    assert arguments == {} if call.name == "now" else set(arguments) == {"city", "days"}
    name, text, ids = "", "", set()
    for chunk in chat(client, tools=TOOLS, tool_choice=choice, max_tokens=100, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            name += delta.function.name or ""
            text += delta.function.arguments or ""
            ids |= {delta.id} - {None}
    assert (name, text) == (call.name, call.arguments)
    assert len(ids) == 1


def test_a_tools_result_is_part_of_the_conversation(client: openai.OpenAI) -> None:
    call = chat(client, tools=TOOLS, tool_choice="required", max_tokens=100).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": [{"type": "text", "text": "rain"}]}
    after = chat(client, messages=[*ASKED, call, result], tools=TOOLS, tool_choice="none")
    assert after.choices[0].message.tool_calls is None


def test_the_parsing_helpers_of_the_package(client: openai.OpenAI) -> None:
    from pydantic import BaseModel, Field

    class Weather(BaseModel):
        days: int = Field(ge=1, le=9)
        kind: bool

    parsed = client.chat.completions.parse(model="embedded", messages=ASKED, response_format=Weather, max_tokens=60, seed=3)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    tool = openai.pydantic_function_tool(Weather)
    called = client.chat.completions.parse(
        model="embedded", messages=ASKED, tools=[tool], tool_choice="required", max_tokens=60, seed=3
    )
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)  # type: ignore[index]
    with client.chat.completions.stream(model="embedded", messages=ASKED, response_format=Weather, max_tokens=60, seed=3) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == parsed.choices[0].message.content


def test_completions(lenient: openai.OpenAI) -> None:
    client = lenient
    options: dict[str, Any] = {"model": "embedded", "prompt": "It was a dark", "seed": 1, "max_tokens": 6}
    whole = client.completions.create(**options)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True) if chunk.choices)
    assert streamed == whole.choices[0].text
    echoed = client.completions.create(**options, echo=True, logprobs=2)
    choice = echoed.choices[0]
    assert choice.text == "It was a dark" + whole.choices[0].text
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.text_offset == [choice.text.find(token, at) for at, token in zip(choice.logprobs.text_offset or (), choice.logprobs.tokens, strict=True)]  # fmt: skip  # noqa: E501
    pieces = list(client.completions.create(**options, echo=True, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text


def test_completions_of_several_prompts(lenient: openai.OpenAI, service: Service) -> None:
    client = lenient
    assert service.card is not None
    ids = service.card.encode("The sun", special=True)
    options: dict[str, Any] = {"model": "embedded", "seed": 1, "max_tokens": 4}
    one = client.completions.create(**options, prompt="The sun").choices[0].text
    assert client.completions.create(**options, prompt=ids).choices[0].text == one
    several = client.completions.create(**options, prompt=["The sun", "A cat"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == one
    assert several.usage is not None
    assert several.usage.completion_tokens == 16
    chunks = client.completions.create(
        **options, prompt=["The sun", "A cat"], n=2, stream=True, stream_options={"include_usage": True}
    )
    assert list(chunks)[-1].usage == several.usage
    nothing = client.completions.create(model="embedded", prompt="The sun", max_tokens=0, echo=True, logprobs=1)
    assert nothing.choices[0].text == "The sun"


def error_of(call: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"extra_body": {"foo": 1}}, "foo", "unknown_parameter"),
        ({"extra_body": {"audio": {}}}, "audio", "unsupported_parameter"),
        ({"extra_body": {"prediction": {}}}, "prediction", "unsupported_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"store": True}, "store", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, "chat_template_kwargs", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content.0", "unsupported_parameter"),  # noqa: E501
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages", "context_length_exceeded"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "what"}}}}, "response_format", "invalid_json_schema"),  # noqa: E501
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, options: Any, param: str, code: str) -> None:
    error = error_of(lambda: chat(client, **options))
    assert isinstance(error, openai.BadRequestError)
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert param.rpartition(".")[2] in error.message or code == "context_length_exceeded"


def test_a_prompt_that_is_too_long_is_told_both_numbers(client: openai.OpenAI) -> None:
    error = error_of(lambda: client.completions.create(model="embedded", prompt=[5] * 2000))
    assert error.code == "context_length_exceeded"
    assert "1024" in error.message
    assert "2000" in error.message


def test_an_answer_ends_with_the_context(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="embedded", prompt=[5] * 1020, max_tokens=100, extra_body={"ignore_eos": True}, seed=1)
    assert (answer.choices[0].finish_reason, answer.usage and answer.usage.total_tokens) == ("length", 1024)


def test_other_models_are_not_found(client: openai.OpenAI) -> None:
    assert isinstance(error_of(lambda: chat(client, model="gpt-5")), openai.NotFoundError)


def test_suffix_and_best_of(client: openai.OpenAI) -> None:
    for options in ({"suffix": "end"}, {"best_of": 3}):
        error = error_of(lambda options=options: client.completions.create(model="embedded", prompt="x", **options))
        assert error.param == next(iter(options))


def test_the_client_gives_up(client: openai.OpenAI, service: Service) -> None:
    """Its timeout closes the connection, which ends the work."""
    from tests.support.serving import wait_for

    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(
            model="embedded", prompt="x", max_tokens=900, extra_body={"ignore_eos": True}
        )
    wait_for(lambda: not service.scheduler.running and not service.scheduler.waiting)
