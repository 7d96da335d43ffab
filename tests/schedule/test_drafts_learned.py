"""What drafts choose teaches the expert cache what their texts choose, and nothing more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fate_moe.engine.load
from fate_moe.core import EvictionPolicy
from fate_moe.kernels.native import native
from fate_moe.registry import make_policy
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.drafted import drafted
from fate_moe.schedule.request import Request, Sampling
from fate_moe.schedule.speculation import Speculation
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.memory.test_table import Journal
from tests.schedule.test_speculation import Oracle, answers, said
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model

pytestmark = pytest.mark.slow

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

TOKENS = 40
PROMPT = tuple(range(1, 12))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mixtral")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
        yield convert(tiny_checkpoint("mixtral", folder / "checkpoint", torch.bfloat16), folder / "store", "int4")


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that are made, in order. One that is asked for by "journal" writes down what it is told, and keeps the order of LRU."""
    made = list[Any]()

    def make(name: str, *args: Any) -> EvictionPolicy:
        policy: Any = make_policy(name, *args)
        made.append(Journal(policy) if name == "lru" else policy)
        return made[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(fate_moe.engine.load, "make_policy", make)
    monkeypatch.setattr(fate_moe.engine.load, "load_statistics", lambda store: None)
    monkeypatch.setattr(fate_moe.engine.load, "save_statistics", lambda store, state: None)
    return made


def served(model: Any, speculation: Speculation | None) -> list[int]:
    scheduler = BatchScheduler(lambda: (model, Words()), parallel=1, speculation=speculation)
    request = Request(PROMPT, TOKENS, Sampling(0.0), ignore_eos=True, top_logprobs=0)
    try:
        return [record.token for record in said(answers(scheduler, request)[0])[1]]
    finally:
        scheduler.close()


def generated(model: Any, speculation: Speculation | None) -> list[int]:
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    loop = drafted(speculation) if speculation else None
    text = model.generate(torch.tensor([PROMPT]), custom_generate=loop, **options)
    return text[0, len(PROMPT) :].tolist()  # type: ignore[no-any-return]


class _Watching:
    def keeps_inputs(self, num_tokens: int) -> bool:
        return False

    def record(self, forward: Any) -> None:
        pass


class Words:
    eos_token_id = None

    def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


@pytest.mark.parametrize("write", [served, generated])
@pytest.mark.parametrize("policy", ["co-activation", "lru"])
@pytest.mark.parametrize("is_watched", [False, True])
def test_a_policy_is_told_of_what_the_text_used(
    write: Callable[[Any, Speculation | None], list[int]],
    policy: str,
    is_watched: bool,
    store: Path,
    policies: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fate_moe.schedule.speculation.PromptLookup", Oracle)
    text, drafts = list[int](), Speculation("lookup", 4)
    for speculation in (None, drafts):
        model = load_model(store, expert_cache="50%", policy=policy)
        Oracle.truth, Oracle.one_in, Oracle.source = [*PROMPT, *text], 3, random.Random(1)
        with model.fate.observe(_Watching()) if is_watched else nullcontext():
            found = write(model, speculation)
        text = text or found
        assert found == text
        model.fate.close()
    assert 0 < drafts.counts.accepted < drafts.counts.drafted
    plain, drafting = policies
    if policy == "lru":
        routed = [[told for told in of.told if told[0] == "routed"] for of in (plain, drafting)]
        assert routed[0] == routed[1]
        used = [{told[1] for told in of.told if told[0] == "touched"} for of in (plain, drafting)]
        assert used[0] == used[1]
        return
    for name, array in plain.state().items():
        assert np.array_equal(array, drafting.state()[name]), name
    assert np.array_equal(plain.statistics.value, drafting.statistics.value)
