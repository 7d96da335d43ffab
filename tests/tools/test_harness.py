"""The adapter for the evaluation harness: scores are the model's, and a tiny local task runs offline."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.cli import main
from fate_moe.tools.harness import register, score
from tests.support.harness_task import write_task

CONTEXT, END = [5, 9, 11, 4], [7, 3]


def test_scores_are_log_probabilities(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    with torch.no_grad():
        logits = model(torch.tensor([[*CONTEXT, *END]])).logits[0].log_softmax(-1)
    total, greedy = score(model, CONTEXT, END, 100)
    assert total == pytest.approx(float(logits[3, 7] + logits[4, 3]), rel=1e-5)
    assert greedy == (int(logits[3].argmax()) == 7 and int(logits[4].argmax()) == 3)
    likeliest = [int(logits[3].argmax())]
    assert score(model, CONTEXT, likeliest, 100)[1]
    shorter, _ = score(model, [1, 2, *CONTEXT], END, 5)  # the last six tokens, of which five are read
    assert shorter == pytest.approx(total, rel=1e-5)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert main(["eval", "harness", "--", "--tasks", "hellaswag"]) == 1
    assert "pip install 'fate-moe[eval]'" in capsys.readouterr().err


def test_a_local_task_runs_offline(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the harness with its dependencies takes 529 MB; pip install 'fate-moe[eval]'")
    from lm_eval.tasks import TaskManager

    register()
    write_task(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = lm_eval.simple_evaluate(model="fate", model_args={"precision": "int4"}, tasks=["tiny"], task_manager=manager)
    assert result["results"]["tiny"]["acc,none"] == 1.0
