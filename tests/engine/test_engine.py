"""``model.fate``: one protocol on both devices; a closed engine leaves the model as it was found."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe import Engine
from fate_moe.adapter.meta_model import build_meta_model
from fate_moe.config import OffloadConfig
from fate_moe.engine.load import build
from fate_moe.engine.prepare import prepare, store_for
from fate_moe.errors import ClosedModelError, StoreError
from tests.support.engines import load_model, simulated_gpu
from tests.support.spoiled import spoil

pytestmark = pytest.mark.slow

PROMPT = torch.tensor([[3, 17, 90, 5]])
REFUSED = ("fate", "forward", "generate", "push_to_hub", "save_pretrained", "state_dict")  # after closing


def facts(model: Any) -> dict[str, Any]:
    """What a patch may change, by module: its class, its parts, their devices, its instance attributes and its hooks."""
    return {
        name: (
            type(module).__name__,
            {leaf: (tuple(value.shape), value.device.type) for leaf, value in module.named_parameters(recurse=False)},
            {leaf: tuple(value.shape) for leaf, value in module.named_buffers(recurse=False)},
            sorted(key for key in vars(module) if not key.startswith("_") and key not in REFUSED),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.fixture(params=["cpu", "cuda"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Any:
    """A running model on the CPU, and on a simulated GPU."""
    store = store_for(checkpoint("qwen2_moe"), "lossless")
    return load_model(store) if request.param == "cpu" else simulated_gpu(store)


def test_both_devices_have_the_same_engine(model: Any) -> None:
    assert isinstance(model.fate, Engine)
    with model.fate as engine:
        model.generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert engine.report().experts.lookups > 0
        assert engine.plan.num_experts == 16
        assert engine.config.preset == "best"
        described = engine.patches.describe().splitlines()
        assert any(line.startswith("model.layers.*.mlp.experts.forward: forward") for line in described)
    assert engine.closed


def test_a_closed_engine_leaves_the_model_as_it_was_found(model: Any, checkpoint: Callable[[str], Path]) -> None:
    engine = model.fate
    model.generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=0)
    lookups = engine.report().experts.lookups
    engine.close()
    engine.close()
    found = build_meta_model(checkpoint("qwen2_moe"))
    assert facts(model) == facts(found)
    assert model.config._experts_implementation == found.config._experts_implementation
    assert model.fate is engine
    assert engine.report().experts.lookups == lookups
    for name in ("forward", "generate", "save_pretrained", "model", "lm_head"):
        with pytest.raises(ClosedModelError, match="has been closed; load it again"):
            getattr(model, name)(PROMPT)


def test_a_report_is_a_snapshot(model: Any) -> None:
    with model.fate as engine:
        before = engine.report().experts
        model.generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert before.lookups == 0
        assert engine.report().experts.since(before).lookups > 0


def test_a_step_of_building_that_fails_leaves_nothing_started(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(store_for(checkpoint("qwen2_moe"), "lossless"), store)
    (store / "generation_config.json").write_text("{torn")
    config = OffloadConfig(context_length=64)
    prepared = prepare(store)
    before, threads = facts(prepared.model), threading.active_count()
    with pytest.raises(StoreError, match=r"generation_config\.json cannot be read"):
        build(prepared, prepared.plan(config), config)
    assert facts(prepared.model) == before
    assert threading.active_count() == threads


def test_fate_check_finds_broken_tables_after_a_pass(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_for(checkpoint("qwen2_moe"), "lossless")
    plain = load_model(store)
    monkeypatch.setenv("FATE_CHECK", "1")
    on_cpu, on_gpu = load_model(store), simulated_gpu(store)
    for each in (plain, on_cpu):
        with torch.inference_mode():
            each(PROMPT)  # what it needs is resident afterwards: the next pass reads nothing into the broken table
        spoil(each.fate.runtime.residency)
    on_gpu.fate.experts.state.tables.slot_of[0, 0] = on_gpu.fate.experts.state.tables.slot_of[0, 1]
    with torch.inference_mode():
        plain(PROMPT)
        for each in (on_cpu, on_gpu):
            with pytest.raises(RuntimeError, match="slot"):
                each(PROMPT)
    for each in (plain, on_cpu, on_gpu):
        each.fate.close()
