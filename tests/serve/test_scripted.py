"""Reasoning and calls of tools as a model of Qwen's kind writes them, through all three APIs; the model is a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import anthropic
import openai
import pytest

from fate_moe import demo
from fate_moe.engine.prepare import load_tokenizer
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.service import Service
from tests.support.serving import Script, Scripted, qwen_like_card, running

TOKENIZER = load_tokenizer(demo.MODEL)
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}}]  # fmt: skip  # noqa: E501
ASKED: list[Any] = [{"role": "user", "content": "hi"}]
# Cut where it hurts: inside the marks, and inside the JSON.
THOUGHT = ["<th", "ink>\nlet me", " see", "\n</thi", "nk>\n\nThe answer", " is 4"]
TWO_CALLS = [*THOUGHT, ".\n<tool", '_call>\n{"name": "get", "argu', 'ments": {"n": "3"}}', "\n</tool_call>\n<tool_call>"]
TWO_CALLS += ['{"name": "get", "arguments": {"n": 4}}</tool_call>']


@contextmanager
def served(*scripts: Script, **options: Any) -> Iterator[tuple[Scripted, openai.OpenAI, anthropic.Anthropic]]:
    scheduler = Scripted(*scripts)
    service = Service(ServeOptions(**options), scheduler, qwen_like_card(TOKENIZER))
    with ExitStack() as stack:
        url = stack.enter_context(running(service))
        usual = {"api_key": "none", "max_retries": 0, "timeout": 20}
        client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", **usual))  # type: ignore[arg-type]
        claude = stack.enter_context(anthropic.Anthropic(base_url=url, **usual))  # type: ignore[arg-type]
        yield scheduler, client, claude


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "qwen-like", "messages": ASKED, **options})


def test_reasoning_and_calls_in_chat() -> None:
    with served(Script(TWO_CALLS)) as (scheduler, client, _):
        whole = chat(client, tools=TOOLS).choices[0]
        assert whole.message.reasoning_content.strip() == "let me see"
        assert whole.message.content.strip() == "The answer is 4."
        calls = whole.message.tool_calls
        assert [json.loads(call.function.arguments) for call in calls] == [{"n": 3}, {"n": 4}]
        assert whole.finish_reason == "tool_calls"
        assert len({call.id for call in calls}) == 2
        assert scheduler.requests[0].keep_special
        streamed: dict[str, str] = {"content": "", "reasoning_content": ""}
        arguments: dict[int, str] = {}
        for chunk in chat(client, tools=TOOLS, stream=True):
            delta = chunk.choices[0].delta.model_dump(exclude_none=True)
            for name in streamed:
                streamed[name] += delta.get(name, "")
            for call in delta.get("tool_calls", []):
                arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
        assert streamed == {"content": whole.message.content, "reasoning_content": whole.message.reasoning_content}
        assert list(arguments.values()) == [call.function.arguments for call in calls]


def test_the_marks_never_show() -> None:
    with served(Script(TWO_CALLS)) as (_, client, _):
        for chunk in chat(client, tools=TOOLS, stream=True):
            delta = chunk.choices[0].delta
            assert "<" not in (delta.content or "") + (getattr(delta, "reasoning_content", "") or "")


def test_one_call_at_a_time() -> None:
    with served(Script(TWO_CALLS)) as (_, client, claude):
        whole = chat(client, tools=TOOLS, parallel_tool_calls=False).choices[0]
        assert [call.function.arguments for call in whole.message.tool_calls] == ['{"n": 3}']
        assert whole.finish_reason == "tool_calls"
        choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
        tools: Any = [{"name": "get", "input_schema": {"type": "object"}}]
        answer = claude.messages.create(model="qwen-like", max_tokens=99, messages=ASKED, tools=tools, tool_choice=choice)
        assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]


def test_reasoning_and_calls_in_responses() -> None:
    tools: Any = [{"type": "function", **TOOLS[0]["function"]}]
    with served(Script(TWO_CALLS)) as (_, client, _):
        whole = client.responses.create(model="qwen-like", input="hi", tools=tools)
        assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
        assert whole.status == "completed"
        assert whole.usage is not None
        assert whole.usage.output_tokens_details.reasoning_tokens > 0
        events = list(client.responses.create(model="qwen-like", input="hi", tools=tools, stream=True))
        final: Any = events[-1]
        assert final.type == "response.completed"
        assert [item.type for item in final.response.output] == [item.type for item in whole.output]
        added = [event.item.id for event in events if event.type == "response.output_item.added"]
        assert added == [item.id for item in final.response.output]
        again = client.responses.create(model="qwen-like", input=[*ASKED, *whole.output, *ASKED], tools=tools)  # type: ignore[list-item]
        assert again.status == "completed"


def test_reasoning_and_calls_in_messages() -> None:
    tools: Any = [{"name": "get", "input_schema": {"type": "object"}}]
    with served(Script(TWO_CALLS)) as (_, _, claude):
        usual: Any = {"model": "qwen-like", "max_tokens": 99, "messages": ASKED, "tools": tools}
        whole = claude.messages.create(**usual)
        kinds = ["thinking", "text", "tool_use", "tool_use"]
        assert [block.type for block in whole.content] == kinds
        assert whole.stop_reason == "tool_use"
        with claude.messages.stream(**usual) as stream:
            final = stream.get_final_message()
        assert [block.type for block in final.content] == kinds
        assert [block.input for block in final.content if block.type == "tool_use"] == [{"n": "3"}, {"n": 4}]
        sent: Any = [*ASKED, {"role": "assistant", "content": [block.model_dump() for block in final.content]}, *ASKED]
        claude.messages.create(**{**usual, "messages": sent})


@pytest.mark.parametrize("pieces", [["<tool_call>", '{"name": oh no}', "</tool_call>", " and so on"], ["<tool_call>", '{"na']])
def test_a_call_that_is_none_is_text(pieces: list[str]) -> None:
    with served(Script(pieces)) as (_, client, _):
        whole = chat(client, tools=TOOLS).choices[0]
        assert whole.message.content == "".join(pieces)
        assert whole.finish_reason == "stop"


def test_an_answer_that_says_nothing_is_the_same_whole_and_streamed() -> None:
    with served(Script([""])) as (_, _, claude):
        usual: Any = {"model": "qwen-like", "max_tokens": 9, "messages": ASKED}
        with claude.messages.stream(**usual) as stream:
            streamed = stream.get_final_message()
        assert (
            [block.type for block in streamed.content]
            == [block.type for block in claude.messages.create(**usual).content]
            == ["text"]
        )


def test_the_template_is_told_of_tools_and_thinking() -> None:
    with served(Script(["ok"])) as (scheduler, client, claude):
        chat(client, tools=TOOLS)
        chat(client, reasoning_effort="none")
        chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        claude.messages.create(model="qwen-like", max_tokens=9, messages=ASKED, thinking={"type": "disabled"})
        chat(client)
        texts = [TOKENIZER.decode(list(request.prompt)) for request in scheduler.requests]
        assert '"name": "get"' in texts[0]
        assert texts[1] == texts[2] == texts[3] == texts[4] + "<think>\n\n</think>\n\n"


def test_what_a_template_refuses_is_the_clients_fault() -> None:
    with served(Script(["ok"])) as (_, client, _):
        with pytest.raises(openai.BadRequestError, match="chat template refuses these messages: not that") as caught:
            chat(client, messages=[{"role": "user", "content": "refuse me"}])
        assert caught.value.param == "messages"


def test_a_failure_is_an_error_in_each_apis_shape() -> None:
    broken = Script(["so far"], end="error", message="the disk is gone")
    with served(broken) as (_, client, claude):
        with pytest.raises(openai.InternalServerError, match="the disk is gone"):
            chat(client)
        with pytest.raises(openai.APIError, match="the disk is gone"):
            list(chat(client, stream=True))
        events = list(client.responses.create(model="qwen-like", input="hi", stream=True))
        assert [event.type for event in events[-2:]] == ["error", "response.failed"]
        with pytest.raises(anthropic.InternalServerError, match="the disk is gone"):
            claude.messages.create(model="qwen-like", max_tokens=9, messages=ASKED)
        with pytest.raises(anthropic.APIStatusError, match="the disk is gone"):
            list(claude.messages.create(model="qwen-like", max_tokens=9, messages=ASKED, stream=True))


def test_seeds_of_several_answers_and_sampling_reach_the_scheduler() -> None:
    with served(Script(["ok"])) as (scheduler, client, _):
        options = {"top_k": -1, "min_p": 0.2, "repetition_penalty": 1.3}
        chat(client, n=3, seed=5, temperature=0.000001, top_p=0.4, frequency_penalty=1, extra_body=options)
        samplings = [request.sampling for request in scheduler.requests]
        assert [sampling.seed for sampling in samplings] == [5, 6, 7]
        one = samplings[0]
        assert (one.temperature, one.top_p, one.top_k, one.min_p) == (0.0, 0.4, 0, 0.2)
        assert (one.repetition_penalty, one.frequency_penalty, one.presence_penalty) == (1.3, 1.0, 0.0)
