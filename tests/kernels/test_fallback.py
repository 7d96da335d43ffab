"""Without the extension everything still works, on torch, and it is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fate_moe.engine.prepare import store_for
from fate_moe.kernels import activations, cpu, native
from tests.support.engines import load_model


def test_without_the_extension(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (cpu, activations, native):
        monkeypatch.setattr(module, "native", None)
    monkeypatch.setattr(native, "_missing", "No module named '_native'")
    monkeypatch.setattr(cpu, "_warned", set())
    store = store_for(checkpoint("qwen2_moe"), "int4")
    with caplog.at_level(logging.WARNING):
        models = [load_model(store, expert_cache=size) for size in ("100%", "50%")]
        assert "make native" in caplog.text  # before there is any text to disturb
        inputs = torch.tensor([[1, 5, 9, 17]])
        whole, half = (
            model.generate(inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True) for model in models
        )
    for model in models:
        model.fate.close()
    assert all(torch.equal(a, b) for a, b in zip(whole.logits, half.logits, strict=True))
    said = [record.message for record in caplog.records if "make native" in record.message]
    assert len(said) == 1
    *sets, torch_ = native.kernel_facts()
    assert all(not used for _, used, _ in sets)
    assert torch_[:2] == ("torch", True)
    assert "make native" in torch_[2]


def test_facts_name_every_instruction_set() -> None:
    facts = native.kernel_facts()
    names = ["amx", "avx512-vnni", "avx2", "neon-dot", "neon", "portable"]
    assert [name for name, _, _ in facts] == names + (["torch"] if native.native is None else [])
    assert all(why for _, _, why in facts)
    assert sum(used for _, used, _ in facts) == 1
