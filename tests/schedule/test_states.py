"""The scheduler's executors on a model whose layers keep a state (Qwen3-Next): states belong to sequences, as blocks do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.kernels.native import native
from fate_moe.schedule.blocks import OutOfBlocksError
from fate_moe.schedule.executor import ModelExecutor, Rows
from fate_moe.schedule.executors import executor_of
from fate_moe.schedule.pool import PoolExecutor
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.schedule.test_executor import step
from tests.support.bits import assert_same
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(native is None, reason="the extension is not built")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("qwen3_next")
    checkpoint = tiny_checkpoint("qwen3_next", folder / "checkpoint", torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
        model = load_model(convert(checkpoint, folder / "store", "int4"), expert_cache="50%", context_length=1024)
    with model.fate:
        yield model


def test_sequences_beside_one_another_give_their_logits_alone(model: Any) -> None:
    """In the pool and in caches of their own: prompts in pieces beside other rows, forks, and entries that are used again."""
    found = list[list[torch.Tensor]]()
    for executor in (ModelExecutor(model, 12), PoolExecutor(model, model.fate.step, 12)):
        assert executor.any_cut
        first, second = executor.new(), executor.new()
        logits = step(executor, Rows(first, range(1, 71)), Rows(second, [5]))
        third = executor.fork(first)
        logits += step(executor, Rows(third, [7]), Rows(first, [9]), Rows(second, range(6, 16)))
        executor.drop(first)
        fourth = executor.new()  # in the entry that was given back
        logits += step(executor, Rows(fourth, range(1, 71)), Rows(third, [3]))
        logits += step(executor, Rows(fourth, [7]), Rows(second, [16]))
        assert_same(logits[0], logits[5])
        assert_same(logits[2], logits[7])  # of a fork, and of the same tokens in another sequence
        found.append(logits)
    for mine, theirs in zip(*found, strict=True):
        assert_same(mine, theirs)


def test_no_more_sequences_than_states(model: Any) -> None:
    executor = executor_of(model)
    assert isinstance(executor, PoolExecutor)
    assert executor.most_sequences is not None
    names = [executor.new() for _ in range(executor.most_sequences)]
    with pytest.raises(OutOfBlocksError, match="room for the states"):
        executor.new()
    executor.drop(names[0])
    step(executor, Rows(executor.new(), [3]))


def test_the_plan_has_room_for_a_sequences_state(model: Any) -> None:
    step, plan = model.fate.step, model.fate.plan
    tokens = 2 * 2 * model.config.num_key_value_heads * model.config.head_dim * len(step.attentions) * 1024
    assert plan.kv_cache_bytes == tokens + step.state_bytes
    assert sum(each[:1].nbytes for of in step.new_pool(1, 1) if len(of) == 2 for each in of) == step.state_bytes > 0


def test_states_that_a_failed_pass_has_written_are_not_gone_on_from(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before the pass is one sequence's; one within it is that of all, for which states are part of the pass."""
    executor = PoolExecutor(model, model.fate.step, 12)
    names = [executor.new() for _ in range(2)]
    want = step(executor, *(Rows(name, range(1, 11)) for name in names))
    result, error = executor.step([Rows(names[0], [7]), Rows(names[1], [1 << 20])])  # no such token
    assert isinstance(error, Exception)
    assert isinstance(result, torch.Tensor)
    executor.drop(names[1])
    again = executor.new()
    assert_same(step(executor, Rows(again, range(1, 11)))[0], want[0])
    assert_same(step(executor, Rows(again, [7]))[0], result)

    def fail(*arguments: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(native, "step", fail)
    assert [type(result) for result in executor.step([Rows(again, [8]), Rows(names[0], [8])])] == [OSError, OSError]
