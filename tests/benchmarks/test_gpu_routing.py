"""What no choice of victims can avoid, against trying all of them; gates, against the regression that defines them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_routing import PASS, belady_misses, better_gates, fit_gates, other_tokens, predicted, recorded, routers
from fate_moe.adapter.meta_model import expert_stacks
from fate_moe.trace.fit import RIDGE
from tests.support.checkpoints import tiny_model

EXPERTS, TOKENS = 4, 5


def fewest(choices: list[set[int]], resident: frozenset[int]) -> int:
    """By trying every set of experts to keep."""
    if not choices:
        return 0
    now, *later = choices
    missing = len(now - resident)
    keeps = itertools.combinations(resident - now, len(resident) - len(now))
    return missing + min(fewest(later, frozenset(now) | frozenset(kept)) for kept in keeps)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("quota", [2, 3])
def test_belady_misses_least(seed: int, quota: int) -> None:
    random = np.random.default_rng(seed)
    choices = np.stack([[random.permutation(EXPERTS)[:2] for _ in range(TOKENS)] for _ in range(2)])
    expected = sum(fewest([set(token.tolist()) for token in layer], frozenset(range(quota))) for layer in choices)
    assert belady_misses(choices, [quota, quota], EXPERTS, 0) == pytest.approx(expected / TOKENS)
    assert belady_misses(choices, [EXPERTS, EXPERTS], EXPERTS, 0) == 0


@pytest.fixture(scope="module")
def random_model() -> Any:
    """On the CPU, and of a size for it."""
    model = tiny_model("qwen3_moe", vocab_size=800)
    random = SimpleNamespace(model=model, stacks=expert_stacks(model))
    random.script = torch.arange(256) % 200
    return random


def test_gates_are_fitted_to_the_next_routers_logits(random_model: Any) -> None:
    fitted = fit_gates(random_model, 2 * PASS)
    passes = [recorded(random_model, other_tokens(random_model, PASS, 1000 + number))[0] for number in range(2)]
    x = torch.nn.functional.pad(torch.cat([inputs[0] for inputs in passes]), (0, 1), value=1.0).double()
    logits = torch.cat([inputs[1] for inputs in passes]).double() @ routers(random_model)[1].double().T
    squares = x.T @ x
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    wanted = torch.linalg.solve(squares, x.T @ (logits - logits.mean(1, keepdim=True))).T
    assert fitted[0] is None
    assert fitted[1] is not None
    torch.testing.assert_close(fitted[1].double(), wanted, rtol=1e-3, atol=1e-4)

    assert better_gates(random_model, fitted)[1] is fitted[1], "they name more than the layer's own router"
    found = predicted(random_model, fitted)
    assert found["recall_k"] < found["fitted_recall_k"] <= 1
