"""Several sequences on a simulated GPU: what ``generate()`` says of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fate_moe.engine.prepare import store_for
from fate_moe.schedule.device_pool import DevicePoolExecutor
from fate_moe.schedule.executor import Result, Rows
from fate_moe.schedule.executors import executor_of
from tests.support.engines import simulated_gpu

pytestmark = pytest.mark.slow

TEXTS = [[3, 17, 40, 9], [8, 5, 6]]  # after prompts of two tokens: two tokens and one


def said(model: Any, text: list[int]) -> torch.Tensor:
    """Logits [len(text) - 1, vocab] after the first two tokens of ``text`` and each further one, by ``generate()``."""
    forced = iter(text[2:])
    result = model.generate(
        torch.tensor([text[:2]]), max_new_tokens=len(text) - 1, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda batch, ids: [next(forced, 0)],
    )  # fmt: skip
    return torch.cat(result.logits)


def logits(results: list[Result]) -> list[torch.Tensor]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


def test_rows_of_several_texts_are_those_of_generate(checkpoint: Callable[[str], Path]) -> None:
    model = simulated_gpu(store_for(checkpoint("qwen2_moe"), "int4"), 9, context_length=250, host_compute="off")
    want = [said(model, text) for text in TEXTS]
    executor = executor_of(model)
    assert isinstance(executor, DevicePoolExecutor)
    first, second = executor.new(), executor.new()
    prompts = logits(executor.step([Rows(first, TEXTS[0][:2]), Rows(second, TEXTS[1][:2])]))
    drafted = [Rows(first, [TEXTS[0][2], 77], 2), Rows(second, TEXTS[1][2:])]
    once = logits(executor.step(drafted))
    executor.cut(first, 3)
    third = executor.fork(first)
    again = logits(executor.step([Rows(third, TEXTS[0][3:])]))
    assert torch.equal(torch.cat([prompts[0], once[0][:1], again[0]]), want[0])
    assert torch.equal(torch.cat([prompts[1], once[1]]), want[1])
    for name in (first, second, third):
        executor.drop(name)
    executor.blocks.check_integrity()
    assert torch.equal(said(model, TEXTS[1][:2]), want[1][:1])  # the cache is its own again
    model.fate.close()
