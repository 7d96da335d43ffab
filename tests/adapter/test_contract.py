"""What a user reads when another transformers renames something: which rule broke, and what to do, in one sentence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fate_moe.adapter.meta_model import build_meta_model, expert_stacks
from fate_moe.engine.attach import routers_of
from fate_moe.engine.patches import Patches
from fate_moe.errors import UnsupportedModelError
from tests.support.checkpoints import tiny_checkpoint, tiny_model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        build_meta_model(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert "breaks a rule of mixtral" in said
    assert said.endswith("`fate models` says which version was tried: install that one, and report the family")
    return said


def change(monkeypatch: pytest.MonkeyPatch, then: Any) -> None:
    """Let ``then(experts module)`` happen at the end of the constructor of Mixtral's experts."""
    original = MixtralExperts.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        then(self)

    monkeypatch.setattr(MixtralExperts, "__init__", init)


def test_a_mark_of_experts_is_renamed(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(MixtralExperts, "_apply_gate")
    assert "model.layers.0.mlp.experts (MixtralExperts) has no _apply_gate" in refusal(mixtral)


def test_a_parameter_of_experts_is_renamed(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(experts: Any) -> None:
        experts.out_proj = experts.down_proj
        del experts.down_proj

    change(monkeypatch, rename)
    said = refusal(mixtral)
    assert "parameters are down_proj, gate_up_proj and their biases; model.layers.0.mlp.experts has gate_up_proj, out_proj" in said


def test_a_flag_of_experts_is_renamed(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, lambda experts: delattr(experts, "has_gate"))
    assert "model.layers.0.mlp.experts lacks has_gate" in refusal(mixtral)


def test_experts_of_a_new_kind(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, lambda experts: setattr(experts, "has_second_thoughts", True))
    assert "model.layers.0.mlp.experts says has_second_thoughts, which this engine does not know" in refusal(mixtral)


def test_experts_are_called_in_another_way(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, routing: Any) -> None: ...

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "batched_mm", forward)
    said = refusal(mixtral)
    assert "takes (hidden_states, top_k_index, top_k_weights); transformers calls it with (hidden_states, routing)" in said


def test_a_number_is_renamed(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_moe.adapter.meta_model._TOP_K", ("some_other_name",))
    with pytest.raises(UnsupportedModelError, match=r"does not say how many experts a token takes.*report the family"):
        build_meta_model(mixtral)


def test_a_router_is_renamed(caplog: pytest.LogCaptureFixture) -> None:
    """Numbers stay right without look-ahead: a warning, once."""
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.selector = layer.mlp.gate
        del layer.mlp.gate
    with caplog.at_level(logging.WARNING):
        assert routers_of(model, expert_stacks(model), Patches(model)) == [None, None]
    (record,) = caplog.records
    assert "2 of 2 MoE blocks run without look-ahead" in record.getMessage()
    assert "model.layers.0.mlp: none of gate, router, wg is in it" in record.getMessage()


def test_nothing_is_said_of_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("mixtral")
    with caplog.at_level(logging.WARNING):
        assert None not in routers_of(model, expert_stacks(model), Patches(model))
    assert not caplog.records
