"""A small model's drafts change no text, whatever it writes and whatever kind of cache it has."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.kernels.native import native
from fate_moe.schedule.assistant import ModelAssistant
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.request import Request, Sampling
from fate_moe.schedule.speculation import Mode, Speculation
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.schedule.test_drafts_learned import Words
from tests.schedule.test_speculation import answers, said
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model

pytestmark = pytest.mark.slow

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Tiny ones by family, with one vocabulary."""
    folder, made = tmp_path_factory.mktemp("models"), dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
        for family in ("mixtral", "gpt_oss", "qwen3_next"):
            made[family] = load_model(_converted(family, folder), expert_cache="50%")
        made["again"] = load_model(folder / "mixtral")
    yield made
    for model in made.values():
        model.fate.close()


def _converted(family: str, folder: Path) -> Path:
    return convert(tiny_checkpoint(family, folder / f"{family}-checkpoint", torch.bfloat16), folder / family, "int4")


@pytest.mark.parametrize("family", ["again", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("mode", ["assistant", "auto"])
def test_texts_are_those_without(models: dict[str, Any], family: str, mode: Mode) -> None:
    model = models["mixtral"]
    requests = [
        Request((start, 5, 9), 30, Sampling(temperature, seed=3), ignore_eos=True, top_logprobs=1)
        for start, temperature in ((1, 0.0), (2, 0.0), (3, 0.7))
    ]
    texts, speculation = list[Any](), Speculation(mode, 4, assistant=ModelAssistant(models[family]))
    for drafts in (None, speculation):
        scheduler = BatchScheduler(lambda: (model, Words()), parallel=3, speculation=drafts)
        texts.append([said(events) for events in answers(scheduler, *requests)])
        scheduler.close()
    assert texts[0] == texts[1]
    drafted, kept = speculation.counts.by_source.get("assistant", (0, 0))
    if mode == "assistant":
        assert drafted > 20
        if family == "again":  # the likeliest tokens of the same model: right but for the text that is sampled
            assert kept > 40


def test_what_a_text_lost_is_taken_back(models: dict[str, Any]) -> None:
    draw = random.Random(1)
    for family in ("again", "gpt_oss", "qwen3_next"):
        assistant, text = ModelAssistant(models[family]), [1, 2, 3, 4]
        reading = assistant.text()
        for _ in range(6):
            found = reading.draft(text, 3)
            assert found == assistant.text().draft(text, 3)
            text += [*found[: draw.randrange(3)], draw.randrange(1, 100)]
    assert assistant.text().draft([1] * 255, 9) == assistant.text().draft([1] * 255, 1), "its context ends"
    assert assistant.text().draft([1] * 256, 9) == []
