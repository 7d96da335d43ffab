"""Logits of a sequence are the same bits in any cut of it, alone or beside others, with any padding, threads and budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe import demo
from fate_moe.engine.prepare import load_tokenizer
from fate_moe.kernels.native import native
from fate_moe.layers import model_step
from fate_moe.layers.cpu_step import CpuStep
from fate_moe.layers.model_step import SequenceRows
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.request import Request, Sampling
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.schedule.test_batching import answers, end_of
from tests.schedule.test_batching import tokens_of as tokens_of_answer
from tests.support.bits import assert_same
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model

pytestmark = pytest.mark.slow

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

MODELS = [
    *(
        (family, "bf16")
        for family in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "granitemoe_swa")
    ),
    *((family, "int8") for family in ("gpt_oss", "deepseek_v2", "qwen3_next")),
]
LENGTH = 150


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model, everything quantized that may be, and the format of its KV cache."""
    family, kv_cache = request.param
    folder = tmp_path_factory.mktemp(family)
    checkpoint = tiny_checkpoint(family, folder / "checkpoint", torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
        store = convert(checkpoint, folder / "store", "int4")
        model = load_model(store, expert_cache="50%", context_length=1024, kv_cache=kv_cache)
        model.store = store
        assert all(isinstance(layer.forward, CpuStep) for layer in model.model.layers)
        assert model.fate.step is not None
        yield model
    model.fate.close()


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each native call of a pass."""
    found, original = list[int](), native.step

    def counted(step: Any, *args: Any) -> Any:
        found.append(len(step))
        return original(step, *args)

    monkeypatch.setattr(native, "step", counted)
    return found


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(1, 128, (1, length), generator=torch.Generator().manual_seed(length))


def logits_in(model: Any, tokens: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """[length, vocabulary], the prompt fed in ``pieces``."""
    past, logits, first = None, list[torch.Tensor](), 0
    with torch.inference_mode():
        for length in pieces:
            out = model(tokens[:, first : first + length], past_key_values=past, use_cache=True)
            past, first = out.past_key_values, first + length
            logits.append(out.logits[0])
    return torch.cat(logits)


@st.composite
def cuts(draw: st.DrawFn) -> list[int]:
    """Lengths that add up to LENGTH, many of them 1."""
    pieces, left = [], LENGTH
    while left:
        pieces.append(min(left, draw(st.one_of(st.just(1), st.integers(1, 9), st.integers(1, LENGTH)))))
        left -= pieces[-1]
    return pieces


@settings(max_examples=6, deadline=None)
@given(cuts())
def test_any_cut_gives_the_same_logits(model: Any, pieces: list[int]) -> None:
    tokens = tokens_of(LENGTH)
    assert_same(logits_in(model, tokens, pieces), logits_in(model, tokens, [LENGTH]))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int, list[int], int, int]:
    """Lengths of up to four sequences, padding before the longest, the pieces in which all are fed, rows of a native call, and
    threads."""
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    padding = draw(st.sampled_from([0, 0, 3, 70]))
    pieces, left = [], max(lengths) + padding
    while left:
        pieces.append(min(left, draw(st.one_of(st.just(1), st.integers(1, 200)))))
        left -= pieces[-1]
    return lengths, padding, pieces, draw(st.sampled_from([5, 64, 512])), draw(st.integers(1, 2))


@settings(max_examples=8, deadline=None)
@given(batches())
def test_any_batch_gives_the_logits_of_its_sequences_alone(model: Any, batch: tuple[list[int], int, list[int], int, int]) -> None:
    lengths, padding, pieces, most, threads = batch
    total, before = max(lengths) + padding, torch.get_num_threads()
    tokens, mask = torch.zeros(2, len(lengths), total, dtype=torch.int64)
    for i, length in enumerate(lengths):
        tokens[i, total - length :], mask[i, total - length :] = tokens_of(length)[0], 1
    positions, past, logits, end = (mask.cumsum(1) - 1).clamp(min=0), None, [], 0
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_step, "ROWS_AT_ONCE", most)
            for piece in pieces:
                end += piece
                part = slice(end - piece, end)
                out = model(
                    tokens[:, part],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, part],
                    past_key_values=past,
                    use_cache=True,
                )
                past = out.past_key_values
                logits.append(out.logits)
    finally:
        torch.set_num_threads(before)
    for length, got in zip(lengths, torch.cat(logits, 1), strict=True):
        assert_same(got[total - length :], logits_in(model, tokens_of(length), [length]), f"{length} tokens")


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=4), st.randoms(use_true_random=False), st.integers(1, 70))
def test_rows_of_sequences_in_a_pool_of_blocks_give_their_logits_alone(
    model: Any, lengths: list[int], random: Any, most: int
) -> None:
    """Each pass takes up to ``most`` rows of every sequence that is not at its end."""
    free, done = random.sample(range(12), 12), [0] * len(lengths)
    blocks = [[free.pop() for _ in range(0, length, 64)] for length in lengths]
    pool, entries = model.fate.step.new_pool(12, 5), random.sample(range(5), 4)
    for states in (each for of in pool for each in of):
        states.fill_(255 if states.dtype == torch.uint8 else torch.nan)  # what nobody wrote is never read
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        counts = [min(random.randint(1, most), length - at) for at, length in zip(done, lengths, strict=True)]
        some = [i for i, count in enumerate(counts) if count]
        tokens = [token for i in some for token in tokens_of(lengths[i])[0, done[i] : done[i] + counts[i]].tolist()]
        rows = [SequenceRows(counts[i], done[i], blocks[i], entries[i]) for i in some]
        logits = model.fate.run_rows(tokens, rows, pool, range(len(tokens)))
        for i, of in zip(some, logits.split([counts[i] for i in some]), strict=True):
            found[i].append(of)
            done[i] += counts[i]
    for length, got in zip(lengths, found, strict=True):
        assert_same(torch.cat(got), logits_in(model, tokens_of(length), [length]), f"{length} tokens")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "beams", "lookup"])
def test_generate_runs_all_layers_in_one_call(model: Any, rows_run: list[int], options: dict[str, int]) -> None:
    """With padding, beams, and several tokens of one sequence: one native call a pass, and the text of each sequence alone."""
    if "prompt_lookup_num_tokens" in options and model.fate.step.state_bytes:
        pytest.skip("transformers guesses no tokens of models with a state, which cannot be cut")
    lengths = [5] if "prompt_lookup_num_tokens" in options else [5, 9, 1]
    tokens, mask = torch.zeros(2, len(lengths), 9, dtype=torch.int64)
    for i, length in enumerate(lengths):
        tokens[i, 9 - length :], mask[i, 9 - length :] = tokens_of(length)[0], 1
    most = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    texts = model.generate(tokens, attention_mask=mask, **most)[:, 9:]
    hook.remove()
    assert rows_run == [len(model.model.layers)] * len(passes)
    for length, text in zip(lengths, texts, strict=True):
        ids = tokens_of(length)
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **most)[0, length:], text)


def test_a_prefix_that_is_there_gives_the_same_logits(model: Any) -> None:
    """Behind the blocks of another text, in every layer: whole ones, windows, latent rows, checkpoints of states."""
    scheduler = BatchScheduler(lambda: (model, load_tokenizer(demo.MODEL)), parallel=2)
    prompt = tuple(tokens_of(150)[0].tolist())
    request = Request((*prompt, 9, 8), 6, Sampling(temperature=0), ignore_eos=True, top_logprobs=3)
    try:
        alone = answers(scheduler, request)[0]
        assert end_of(alone).usage.cached_tokens == 0
        answers(scheduler, Request((*prompt[:130], 5), 3, Sampling(temperature=0), ignore_eos=True))
        again = answers(scheduler, request)[0]
        assert end_of(again).usage.cached_tokens == 128
        assert tokens_of_answer(again) == tokens_of_answer(alone)
    finally:
        scheduler.close()


def test_another_budget_gives_the_same_logits(model: Any) -> None:
    with load_model(model.store, expert_cache="100%", kv_cache=model.fate.config.kv_cache).fate as engine:
        tokens = tokens_of(30)
        for _ in range(2):  # while slots fill, and with all experts there
            assert_same(logits_in(engine.model, tokens, [20, 1, 9]), logits_in(model, tokens, [30]))


def test_one_by_one_without_a_cache_and_on_other_threads(model: Any) -> None:
    tokens = tokens_of(40)
    want = logits_in(model, tokens, [40])
    assert_same(logits_in(model, tokens, [1] * 40), want)
    with torch.inference_mode():
        assert_same(model(tokens, use_cache=False).logits[0], want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads)
        assert_same(logits_in(model, tokens, [17, 1, 22]), want)
    finally:
        torch.set_num_threads(threads)


def test_every_instruction_set_gives_the_same_logits(model: Any) -> None:
    tokens, logits = tokens_of(30), list[torch.Tensor]()
    try:
        for name in native.instruction_sets():
            native.choose(name)
            logits.append(logits_in(model, tokens, [20, 1, 9]))
    finally:
        native.choose(native.instruction_sets()[0])
    for other in logits[1:]:
        assert_same(other, logits[0])
