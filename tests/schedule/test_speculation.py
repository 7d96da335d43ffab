"""Drafts change no text, no log probability and no block: they only save passes."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fate_moe
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.drafted import drafted
from fate_moe.schedule.lookup import PromptLookup
from fate_moe.schedule.request import Event, Finished, Piece, Request, Sampling
from fate_moe.schedule.speculation import Mode, Speculation
from fate_moe.serve.card import ModelCard
from fate_moe.serve.constraint import constraint, json_grammar
from fate_moe.tools.generate import generate
from tests.support.batching import VOCAB, FakeExecutor, FakeModel, FakeTokenizer


def answers(scheduler: BatchScheduler, *requests: Request) -> list[list[Event]]:
    async def collect(request: Request) -> list[Event]:
        return [event async for events in scheduler.submit(request) for event in events]

    async def run() -> list[list[Event]]:
        return list(await asyncio.gather(*map(collect, requests)))

    return asyncio.run(run())


def said(events: list[Event]) -> Any:
    """All that speculation must not change."""
    end = events[-1]
    assert isinstance(end, Finished)
    pieces = [event for event in events if isinstance(event, Piece)]
    records = [record for piece in pieces for record in piece.tokens]
    return "".join(piece.text for piece in pieces), records, end.reason, end.stop, end.usage.completion_tokens


def on(executor: FakeExecutor, speculation: Speculation | None, parallel: int = 1) -> BatchScheduler:
    return BatchScheduler(
        lambda: (FakeModel(), FakeTokenizer()),
        parallel=parallel,
        make_executor=lambda model: executor,
        speculation=speculation,
    )


class Oracle(PromptLookup):
    """Knows what will follow, and errs one time in ``one_in``."""

    truth: list[int]
    one_in: int
    source: random.Random

    def draft(self, most: int) -> tuple[list[int], int]:
        right = self.truth[len(self) : len(self) + most]
        drafted = [token if self.source.randrange(self.one_in) else self.source.randrange(1, VOCAB - 1) for token in right]
        return drafted, 2


class Knowing(PromptLookup):
    """As Oracle, of the one of several texts that its own begins."""

    texts: list[list[int]]
    one_in: int
    source: random.Random

    def draft(self, most: int) -> tuple[list[int], int]:
        mine = next(text for text in self.texts if text[: len(self)] == self._tokens)
        right = mine[len(self) : len(self) + most]
        return [token if self.source.randrange(self.one_in) else self.source.randrange(1, VOCAB - 1) for token in right], 2


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, VOCAB - 2), min_size=1, max_size=70),
    st.integers(1, 80),
    st.sampled_from([0.0, 0.7, 1.3]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([(), ("ab",), ("c",)]),
    st.sampled_from([None, 2]),
    st.integers(2, 9),
    st.integers(3, 8),
    st.integers(0, 99),
)
def test_text_and_log_probabilities_are_those_without(
    prompt: list[int],
    tokens: int,
    temperature: float,
    penalty: float,
    stop: Any,
    top: int | None,
    one_in: int,
    blocks: int,
    seed: int,
) -> None:
    request = Request(
        tuple(prompt),
        tokens,
        Sampling(temperature, presence_penalty=penalty, repetition_penalty=1.1, seed=seed),
        stop=stop,
        top_logprobs=top,
    )
    executors = FakeExecutor(blocks), FakeExecutor(blocks)
    plain, drafting = on(executors[0], None), on(executors[1], Speculation("lookup"))
    want = answers(plain, request)[0]
    Oracle.truth, Oracle.one_in, Oracle.source = prompt + [record.token for record in said(want)[1]], one_in, random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fate_moe.schedule.speculation.PromptLookup", Oracle)
        found = answers(drafting, request)[0]
    assert said(found) == said(want)
    plain.close()
    drafting.close()
    assert len(executors[0].steps) - len(executors[1].steps) == drafting.speculation.counts.accepted, "each saves a pass"
    executors[1].blocks.check_integrity()
    assert executors[1].blocks.used == len(executors[1].prefixes or ())


def test_what_is_right_saves_passes_and_what_is_wrong_is_taken_back() -> None:
    request = Request((1, 2, 3), 40, Sampling(0.0), ignore_eos=True)
    executor = FakeExecutor(8)
    plain = on(executor, None)
    want = said(answers(plain, request)[0])
    plain.close()
    for one_in, steps, cuts in ((10**9, 6, 0), (2, 40, None)):
        executor, speculation = FakeExecutor(8), Speculation("lookup")
        Oracle.truth, Oracle.one_in, Oracle.source = [1, 2, 3, *(record.token for record in want[1])], one_in, random.Random(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fate_moe.schedule.speculation.PromptLookup", Oracle)
            drafting = on(executor, speculation)
            assert said(answers(drafting, request)[0]) == want
        drafting.close()
        assert len(executor.steps) <= steps
        assert executor.cuts == cuts if cuts is not None else executor.cuts > 3
        assert drafting.load.drafts == speculation.counts
        assert speculation.counts.accepted == 40 - len(executor.steps)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 60), st.sampled_from([0.0, 0.9])), min_size=2, max_size=5),
    st.sampled_from(["lookup", "auto"]),
    st.integers(2, 9),
    st.integers(5, 12),
)
def test_requests_beside_others_write_what_they_write_alone(
    texts: list[tuple[int, int, float]], mode: Mode, one_in: int, blocks: int
) -> None:
    requests = [
        Request(tuple(1 + (seed + place) % 13 for place in range(length)), tokens, Sampling(temperature, seed=seed))
        for seed, (length, tokens, temperature) in enumerate(texts)
    ]
    plain = on(FakeExecutor(blocks), None)
    want = [said(answers(plain, request)[0]) for request in requests]
    plain.close()
    Knowing.texts = [[*request.prompt, *(record.token for record in of[1])] for request, of in zip(requests, want, strict=True)]
    Knowing.one_in, Knowing.source = one_in, random.Random(len(texts))
    executor, speculation = FakeExecutor(blocks, is_open=False), Speculation(mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fate_moe.schedule.speculation.PromptLookup", Knowing)
        scheduler = on(executor, speculation, parallel=3)
        executor.is_open = True
        found = answers(scheduler, *requests)
    scheduler.close()
    assert [said(events) for events in found] == want
    assert sum(map(sum, executor.learned)) == speculation.counts.accepted
    executor.blocks.check_integrity()
    assert executor.blocks.used == len(executor.prefixes or ())


def test_requests_beside_others_are_drafted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request((start, 6), 41, Sampling(0.0), ignore_eos=True) for start in (1, 2)]
    plain = on(FakeExecutor(8), None)
    want = [said(answers(plain, request)[0]) for request in requests]
    plain.close()
    Knowing.texts = [[*request.prompt, *(record.token for record in of[1])] for request, of in zip(requests, want, strict=True)]
    Knowing.one_in, Knowing.source = 10**9, random.Random(0)
    monkeypatch.setattr("fate_moe.schedule.speculation.PromptLookup", Knowing)
    executor = FakeExecutor(8, is_open=False)
    scheduler = on(executor, Speculation("lookup", 4), parallel=2)
    executor.is_open = True
    assert [said(events) for events in answers(scheduler, *requests)] == want
    scheduler.close()
    assert sum([one.drafted for one in step] == [4, 4] for step in executor.steps) >= 7, "most passes make ten tokens"


class Forcing:
    """A grammar of a fixed text: each token leaves one that may follow, and ``ahead`` of them are known at once."""

    def __init__(self, text: list[int], prompt_tokens: int, ahead: int) -> None:
        self._text, self._start, self._ahead = text, prompt_tokens, ahead

    def forced(self, ids: torch.Tensor) -> list[int]:
        done = ids.shape[1] - self._start
        return self._text[done : done + self._ahead]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, float("-inf"))
        token = self._text[ids.shape[1] - self._start]
        only[0, token] = scores[0, token]
        return only


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_a_grammar_forces_needs_no_pass(temperature: float) -> None:
    text = [1 + place * place % 13 for place in range(40)]
    steps = list[int]()
    texts = list[Any]()
    for mode in ("off", "lookup"):
        request = Request(
            (1, 2, 3), 40, Sampling(temperature, seed=1), top_logprobs=1, constraint=functools.partial(Forcing, text, 3, 7)
        )
        executor, speculation = FakeExecutor(8), Speculation(mode)  # type: ignore[arg-type]
        scheduler = on(executor, speculation)
        texts.append(said(answers(scheduler, request)[0]))
        scheduler.close()
        steps.append(len(executor.steps))
    assert texts[0] == texts[1]
    assert [record.token for record in texts[0][1]] == text
    assert steps == [40, 6]
    assert speculation.counts.by_source == {"grammar": (34, 34)}


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    model, tokenizer = fate_moe.load(precision="int4", context_length=512)
    yield model, tokenizer
    model.fate.close()


def written(loaded: Any, mode: Mode, *requests: Request) -> tuple[list[Any], Speculation]:
    speculation = Speculation(mode)
    scheduler = BatchScheduler(lambda: loaded, parallel=len(requests), speculation=speculation)
    found = answers(scheduler, *requests)
    scheduler.close()
    return [said(events) for events in found], speculation


@pytest.mark.slow
def test_a_real_model_writes_the_same(loaded: Any) -> None:
    """Rows of one pass have the bits of single rows: sampled, greedy, with log probabilities, alone and beside others."""
    model, tokenizer = loaded
    text = "The cat sat on the mat. The dog sat on the rug. The cat sat on the"
    prompt = tuple(tokenizer(text)["input_ids"])
    requests = [
        Request(prompt[place:], 32, Sampling(temperature, repetition_penalty=1.0, seed=3), ignore_eos=True, top_logprobs=2)
        for place, temperature in enumerate((0.0, 0.5))
    ]
    want = [written(loaded, "off", request)[0][0] for request in requests]
    counts = model.fate.report().drafts
    assert written(loaded, "lookup", *requests)[0] == want
    assert written(loaded, "auto", *requests)[0] == want
    drafts = model.fate.report().drafts
    assert counts.accepted < drafts.accepted < drafts.drafted
    for temperature in (0.0, 0.5):
        options: dict[str, Any] = {"max_new_tokens": 32, "repetition_penalty": 1.0, "eos_token_id": None}
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        texts = []
        for loop in ({}, {"custom_generate": drafted(Speculation("lookup"))}):
            torch.manual_seed(7)
            printed: list[str] = []
            made = generate(model, tokenizer, torch.tensor([prompt]), printed.append, **options, **loop)
            texts.append((made.tokens, "".join(printed)))
        assert texts[0] == texts[1]
        if not temperature:
            assert texts[0][0] == [record.token for record in want[0][1]]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_of_a_schema_is_the_same(loaded: Any, temperature: float) -> None:
    """What a real grammar forces: names of fields, quotes and commas."""
    model, tokenizer = loaded
    fields = {"description": {"enum": ["an old lighthouse", "a small harbour"]}, "visited_before": {"type": "boolean"}}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    prompt = tuple(tokenizer("A place as JSON: ")["input_ids"])
    made = constraint(ModelCard.of("embedded", model, tokenizer), json_grammar(schema), len(prompt), "response_format")
    request = Request(prompt, 64, Sampling(temperature, repetition_penalty=1.0, seed=5), top_logprobs=1, constraint=made)
    want, _ = written(loaded, "off", request)
    for mode in ("auto", "lookup"):
        found, speculation = written(loaded, mode, request)
        assert found == want
    assert set(json.loads(want[0][0])) == set(fields)
    drafts, kept = speculation.counts.by_source["grammar"]
    assert 5 < kept <= drafts
