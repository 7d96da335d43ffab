"""The scheduler on real models: its texts are those of ``generate()``, one alone and several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

import fate_moe
from fate_moe import demo
from fate_moe.engine.prepare import load_tokenizer, store_for
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.executor import Executor, ModelExecutor, Rows
from fate_moe.schedule.executors import executor_of
from fate_moe.schedule.pool import PoolExecutor
from fate_moe.schedule.request import Event, Finished, Piece, Reading, Request, Sampling, Usage
from fate_moe.schedule.sampling import Sampler, _Penalties, choose, generation_config
from tests.schedule.test_batching import answers, end_of, text_of, tokens_of
from tests.support.bits import assert_same

PROMPT = (1094, 326, 260, 1456, 1106)


@pytest.fixture(scope="module", params=["int4", "lossless"])
def loaded(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = fate_moe.load(expert_cache="25%", context_length=1024, precision=request.param)
    with model.fate:
        yield model, tokenizer


@pytest.fixture(scope="module")
def scheduler(loaded: tuple[Any, Any]) -> Iterator[BatchScheduler]:
    scheduler = BatchScheduler(lambda: loaded, parallel=4)
    yield scheduler
    scheduler.close()


def generated(model: Any, request: Request) -> list[int]:
    """What ``model.generate()`` writes with the request's seed."""
    inputs = torch.tensor([request.prompt])
    torch.manual_seed(request.sampling.seed or 0)
    own: list[Any] = []
    if request.sampling.presence_penalty:
        own.append(_Penalties(len(request.prompt), request.sampling.presence_penalty, request.sampling.frequency_penalty))
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=generation_config(model, request),
            logits_processor=LogitsProcessorList(own),
        )
    return list(output[0, len(request.prompt) :].tolist())


def ids(events: list[Event]) -> list[int]:
    return [record.token for record in tokens_of(events)]


def test_several_at_once_are_what_generate_writes(scheduler: BatchScheduler, loaded: tuple[Any, Any]) -> None:
    options: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1, "temperature": 1.0, "top_p": 0.9},
        {"seed": 2, "temperature": 1.5, "top_k": 40, "repetition_penalty": 1.3},
        {"seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {500: 4.0}},
        {"seed": 1, "temperature": 1.0, "top_p": 0.9, "min_p": 0.01},
    ]
    # The fifth waits; of the second the prompt is read in several chunks, where the model allows it, beside others' tokens.
    prompts = [PROMPT, PROMPT * 70, PROMPT[:1], PROMPT * 3, PROMPT[:2]]
    asked = [
        Request(prompt, 24, Sampling(**given), ignore_eos=True, top_logprobs=0)
        for prompt, given in zip(prompts, options, strict=True)
    ]
    found = answers(scheduler, *asked)
    for request, events in zip(asked, found, strict=True):
        assert ids(events) == generated(loaded[0], request)
        alone = answers(scheduler, request)[0]
        assert tokens_of(events) == tokens_of(alone)  # log probabilities to the bit
        kept = (len(request.prompt) - 1) // 64 * 64 if scheduler.load.prefixes.prompt_tokens else 0
        assert end_of(alone).usage.cached_tokens == kept  # of the same prompt all that can be is there
        end = end_of(events)
        assert (end.reason, end.usage) == ("length", Usage(len(request.prompt), 24, end.usage.cached_tokens))
        assert end.timings.decode_tokens_per_second > 0
        assert any(isinstance(event, Reading) for event in events)
    assert text_of(found[0]) == loaded[1].decode(ids(found[0]), skip_special_tokens=True)
    assert scheduler.load.rows > scheduler.load.steps


@pytest.mark.parametrize("kind", ["model", "pool"])
def test_who_is_read_again_writes_the_same(loaded: tuple[Any, Any], kind: str) -> None:
    small = BatchScheduler(lambda: loaded, parallel=3, make_executor=lambda model: executors(model, 3)[kind])
    asked = [
        Request(PROMPT[:number], 80, Sampling(seed=number, temperature=0.9), ignore_eos=True, top_logprobs=0) for number in (2, 3)
    ]
    found = answers(small, *asked)
    assert small.load.preemptions > 0
    small.close()
    for request, events in zip(asked, found, strict=True):
        assert ids(events) == generated(loaded[0], request)


def test_a_new_request_does_not_wait_for_those_that_write(scheduler: BatchScheduler) -> None:
    """Its first token comes before any of the others is done."""
    order: list[int] = []

    async def follow(number: int, request: Request) -> None:
        async for events in scheduler.submit(request):
            if number == 3 and any(isinstance(event, Piece) for event in events):
                order.append(number)
            if isinstance(events[-1], Finished):
                order.append(number)

    async def run() -> None:
        long = [asyncio.create_task(follow(number, Request(PROMPT, 60, ignore_eos=True))) for number in range(3)]
        while scheduler.generated_tokens < started + 10:
            await asyncio.sleep(0.001)
        await asyncio.gather(*long, follow(3, Request(PROMPT, 2, ignore_eos=True)))

    started = scheduler.generated_tokens
    asyncio.run(run())
    assert order[:2] == [3, 3]


def test_no_seed_is_another_text_each_time(scheduler: BatchScheduler) -> None:
    request = Request(PROMPT, 16, Sampling(temperature=1.5))
    assert len({text_of(events) for events in answers(scheduler, *[request] * 3)}) == 3


def test_a_stop_string_ends_the_text(scheduler: BatchScheduler) -> None:
    whole = text_of(answers(scheduler, Request(PROMPT, 24, Sampling(temperature=0)))[0])
    stop = whole[9:15]
    events = answers(scheduler, Request(PROMPT, 24, Sampling(temperature=0), stop=(stop, "never")))[0]
    assert text_of(events) == whole[: whole.find(stop)]
    assert (end_of(events).reason, end_of(events).stop) == ("stop", stop)
    assert end_of(events).usage.completion_tokens < 24


def test_log_probabilities_of_prompt_and_text(scheduler: BatchScheduler) -> None:
    greedy = Sampling(temperature=0)
    plain = answers(scheduler, Request(PROMPT, 8, greedy, top_logprobs=2, prompt_logprobs=True))[0]
    records = tokens_of(plain)
    assert len(records) == 8
    assert all(len(record.top) == 2 and record.logprob is not None for record in records)
    assert all(record.top[0][1] >= (record.logprob or 0) for record in records)
    prompt = end_of(plain).prompt
    assert [record.token for record in prompt] == list(PROMPT)
    assert prompt[0].logprob is None
    # The last token of a prompt has the log probability that it had when it was generated; of a long prompt all have one.
    longer = answers(scheduler, Request((*PROMPT, records[0].token), 0, greedy, top_logprobs=0, prompt_logprobs=True))[0]
    assert end_of(longer).prompt[-1].logprob == pytest.approx(records[0].logprob, abs=0.02)
    long = end_of(answers(scheduler, Request(PROMPT * 60, 0, greedy, top_logprobs=0, prompt_logprobs=True))[0])
    assert [record.token for record in long.prompt] == list(PROMPT * 60)
    assert None not in [record.logprob for record in long.prompt[1:]]


def test_penalties_are_openais() -> None:
    scores = torch.zeros(1, 5)
    prompt_and_text = torch.tensor([[1, 1, 2, 3, 3, 3, 4]])
    assert _Penalties(2, 0.5, 0.25)(prompt_and_text, scores).tolist() == [[0.0, 0.0, -0.75, -1.25, -0.75]]


def test_rows_of_one_kind_are_scored_together_and_alike(loaded: tuple[Any, Any]) -> None:
    model, source = loaded[0], torch.Generator().manual_seed(0)
    logits = torch.randn(5, model.config.vocab_size, generator=source).bfloat16() * 4
    options = [{}, {}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0}]

    def samplers() -> list[Sampler]:
        return [Sampler(model, Request(PROMPT, 4, Sampling(seed=9, **given)), 9) for given in options]  # type: ignore[arg-type]

    assert samplers()[0].kind == samplers()[1].kind != samplers()[2].kind
    together = choose(samplers(), list(logits))
    assert together == [choose([sampler], [row])[0] for sampler, row in zip(samplers(), logits, strict=True)]


def executors(model: Any, num_blocks: int) -> dict[str, Executor]:
    assert executor_of(model).shares_passes
    pool = PoolExecutor(model, model.fate.step, num_blocks)
    for states in (each for of in pool.pool for each in of):
        states.fill_(255 if states.dtype == torch.uint8 else float("nan"))  # what nobody wrote is never read
    return {"model": ModelExecutor(model, num_blocks), "pool": pool}


def step(executor: Executor, *rows: Rows) -> list[torch.Tensor]:
    results = executor.step(rows)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


def test_both_executors_give_the_same_logits_and_forks_go_on(loaded: tuple[Any, Any]) -> None:
    found = list[list[torch.Tensor]]()
    for executor in executors(loaded[0], 12).values():
        first = executor.new()
        logits = step(executor, Rows(first, PROMPT * 14))  # 70 tokens: the second block is filled in part
        second = executor.fork(first)
        logits += step(executor, Rows(first, [7]), Rows(second, [9]))
        executor.drop(first)
        logits += step(executor, Rows(executor.new(), PROMPT * 30), Rows(second, [3]))
        third, fourth = executor.fork(second), executor.new()
        step(executor, Rows(fourth, PROMPT * 14))
        step(executor, Rows(fourth, [9]))
        logits += step(executor, Rows(second, [5]), Rows(third, [5]), Rows(fourth, [3]))
        assert_same(logits[-3], logits[-2])  # of a fork
        assert_same(logits[-1], logits[4])  # of the same tokens in blocks of their own
        assert not torch.equal(logits[1], logits[2])
        found.append(logits)
    for mine, theirs in zip(*found, strict=True):
        assert_same(mine, theirs)


def test_a_pool_in_int8_has_what_a_cache_in_int8_has() -> None:
    """Of a prompt that goes through the model's own forward, too."""
    model, _ = fate_moe.load(expert_cache="25%", context_length=1024, kv_cache="int8")
    with model.fate:
        found = []
        for executor in executors(model, 12).values():
            name = executor.new()
            logits = step(executor, Rows(name, PROMPT * 14, wanted=70))
            logits += step(executor, Rows(name, [7]))
            found.append([*logits, *step(executor, Rows(executor.new(), PROMPT))])
        for mine, theirs in zip(*found, strict=True):
            assert_same(mine, theirs)


def test_an_entry_that_fails_is_not_the_others(loaded: tuple[Any, Any]) -> None:
    for executor in executors(loaded[0], 8).values():
        good, bad = executor.new(), executor.new()
        result, error = executor.step([Rows(good, [5]), Rows(bad, [1 << 20])])  # no such token
        assert isinstance(error, Exception)
        executor.drop(bad)
        assert isinstance(result, torch.Tensor)
        again = executor.new()
        assert_same(step(executor, Rows(again, [5]))[0], result)
        mine, theirs = step(executor, Rows(good, [6]), Rows(again, [6]))
        assert_same(mine, theirs)


def test_cancelling_while_the_prompt_is_read(scheduler: BatchScheduler) -> None:
    async def run() -> Finished:
        ticket = scheduler.submit(Request(PROMPT * 150, 50))
        async for events in ticket:
            if any(isinstance(event, Reading) for event in events):
                ticket.cancel()
            assert not any(isinstance(event, Piece) for event in events)
        return end_of(events)

    end = asyncio.run(run())
    assert (end.reason, end.usage.completion_tokens) == ("cancelled", 0)
    assert end_of(answers(scheduler, Request(PROMPT, 2))[0]).reason == "length"


def test_cancelling_stops_within_a_token(scheduler: BatchScheduler) -> None:
    """Steps are counted from the moment of cancelling."""
    steps = 0

    async def run() -> Finished:
        nonlocal steps
        ticket = scheduler.submit(Request(PROMPT, 500, Sampling(seed=0), ignore_eos=True))
        async for events in ticket:
            if any(isinstance(event, Piece) for event in events) and not steps:
                steps = scheduler.load.steps
                ticket.cancel()
        return end_of(events)

    assert asyncio.run(run()).reason == "cancelled"
    assert scheduler.load.steps <= steps + 2  # one may be under way, and another may begin before the event loop hears of the piece


def test_a_prefix_gives_the_same_bits_from_memory_and_from_the_disk(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And after other texts took its room, after a restart, and where files are torn."""
    model = loaded[0]
    monkeypatch.setenv("FATE_HOME", str(tmp_path))
    monkeypatch.setattr(model.fate, "config", replace(model.fate.config, prefix_cache_disk="64MiB"))
    asked = Request(PROMPT * 64, 6, Sampling(temperature=0), ignore_eos=True, top_logprobs=3)
    other = Request(tuple(range(100, 1000)), 2, Sampling(temperature=0), ignore_eos=True)

    def asks(scheduler: BatchScheduler, cached: int) -> None:
        events = answers(scheduler, asked)[0]
        assert tokens_of(events) == tokens_of(want)
        assert end_of(events).usage.cached_tokens == cached

    scheduler = BatchScheduler(lambda: loaded)
    want = answers(scheduler, asked)[0]
    steps = scheduler._steps
    assert steps is not None
    if not steps.executor.any_cut:
        assert steps.executor.disk is None
        scheduler.close()
        return
    assert end_of(want).usage.cached_tokens == 0
    asks(scheduler, 256)
    disk, until = steps.executor.disk, time.monotonic() + 30
    assert disk is not None
    while disk.has_work and time.monotonic() < until:  # on a busy machine, what is to be written may not be yet
        time.sleep(0.01)
    answers(scheduler, other)  # the pool has 16 blocks: some of the first text's go
    asks(scheduler, 256)
    scheduler.close()
    report = model.fate.report()
    assert report.prefixes == scheduler.load.prefixes
    assert report.prefixes.cached_tokens == 2 * 256
    assert report.prefixes.kept_bytes == len(steps.executor.prefixes or ()) * 12 * 2 * 4 * 64 * 32 * 2
    assert (report.prefixes.disk_read_bytes, report.prefixes.disk_bytes > 0) == (disk.files.read_bytes, True)
    assert report.prefixes.saved_seconds > 0
    assert "prompt tokens were there" in str(report)
    assert report.as_dict()["prefixes"]["prompt_tokens"] == report.prefixes.prompt_tokens
    assert disk.files.read_bytes > 0

    def restarted(cached: int) -> None:
        scheduler = BatchScheduler(lambda: loaded)
        asks(scheduler, cached)
        scheduler.close()

    restarted(256)
    folder = next(path for path in (tmp_path / "kv").iterdir() if path.is_dir())
    assert all(path.stat().st_size == disk.files.num_bytes // len(list(folder.iterdir())) for path in folder.iterdir())
    third = folder / f"{kv_names(model, asked.prompt)[2].hex()}.kv"
    third.write_bytes(third.read_bytes()[:-1])
    restarted(128)
    restarted(256)  # it was written again
    monkeypatch.setattr(model.fate, "config", replace(model.fate.config, prefix_cache_disk="64MiB", exact_activations=True))
    restarted(0)  # other numbers: another model


def kv_names(model: Any, tokens: tuple[int, ...]) -> list[bytes]:
    prefixes = executor_of(model).prefixes
    assert prefixes is not None
    return prefixes.names(tokens)


@pytest.mark.slow
def test_on_a_gpu_tokens_come_from_the_fused_step(checkpoint: Callable[[str], Path]) -> None:
    """What watches the prompt is gone from the layers when the step looks for hooks. One sequence at a time."""
    pytest.importorskip("triton")
    from tests.support.engines import simulated_gpu

    model = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless"))
    scheduler = BatchScheduler(lambda: (model, load_tokenizer(demo.MODEL)), parallel=8)
    for options in ({}, {"top_logprobs": 1, "prompt_logprobs": True}):
        before = model.fate.decode.steps
        request = Request((3, 17, 90, 5), 4, Sampling(temperature=0), ignore_eos=True, **options)  # type: ignore[arg-type]
        found = answers(scheduler, *[request] * (1 if options else 2))
        assert model.fate.decode.steps == before + 3 * len(found)
        assert len({text_of(events) for events in found}) == 1
        assert any(isinstance(event, Reading) for event in found[0])
    assert scheduler.parallel == 1
    scheduler.close()
    model.fate.close()
