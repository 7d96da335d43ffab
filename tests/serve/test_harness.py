"""EleutherAI's harness against the server: its own client for OpenAI's completions, on a task without downloads."""

from __future__ import annotations

from pathlib import Path

import pytest

import fate_moe
from fate_moe.serve.service import Service
from fate_moe.tools.harness import score
from tests.support.harness_task import QUESTIONS, write_task

DEMO = Path(fate_moe.__file__).parent / "demo" / "model"


def test_local_completions_scores_as_the_model_does(tmp_path: Path, url: str, service: Service) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the harness with its dependencies takes 529 MB; pip install 'fate-moe[eval]'")
    from lm_eval.tasks import TaskManager

    card = service.card
    assert card is not None
    write_task(tmp_path)
    result = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "embedded",
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(DEMO),
            "max_length": 512,
            "num_concurrent": 2,
        },
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    assert result["results"]["tiny"]["acc,none"] == 1.0
    found = {
        sample["doc"]["question"]: [float(score[0]) for score in sample["filtered_resps"]] for sample in result["samples"]["tiny"]
    }
    for question in QUESTIONS:
        context, expected = card.encode(question["question"], special=True), list[float]()
        for choice in question["choices"]:
            expected.append(score(card.model, context, card.encode(choice, special=False), 512)[0])
        assert found[question["question"]] == pytest.approx(expected, abs=1e-4)
