"""Scaled rotary embeddings: the logits are transformers' own, beyond the length that a model was first made for too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.layers.angles import Angles
from fate_moe.layers.model_step import around_reasons
from fate_moe.store.convert import convert
from tests.support.bits import assert_same
from tests.support.checkpoints import tiny_model
from tests.support.engines import load_model

HALF = 8  # frequencies of a tiny head
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [1.0] * HALF, "long_factor": [4.0] * HALF, "original_max_position_embeddings": 32},
}


def model_with(kind: str, dtype: torch.dtype) -> Any:
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    longest = 32 if kind == "dynamic" else 128
    return tiny_model("qwen3_moe", dtype, rope_parameters=rope, max_position_embeddings=longest)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROPES)
def test_logits_are_transformers_own(kind: str, tmp_path: Path) -> None:
    """A prompt beyond the first 32 positions, and tokens behind it."""
    own = model_with(kind, torch.float32)
    own.save_pretrained(tmp_path / "checkpoint")
    tokens = torch.randint(4, 128, (1, 44), generator=torch.Generator().manual_seed(0))
    with load_model(convert(tmp_path / "checkpoint", tmp_path / "store"), expert_cache="100%").fate as engine, torch.no_grad():
        found = []
        for model in (own, engine.model):
            out = model(tokens[:, :40], use_cache=True)
            logits = [out.logits[0]]
            for at in range(40, 44):
                out = model(tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits[0])
            found.append(torch.cat(logits))
    assert 0 <= (found[0] - found[1]).abs().max() < 3e-5
    plain = tiny_model("qwen3_moe")
    with torch.no_grad():
        assert (plain(tokens).logits[0] - found[0]).abs().max() > 1e-3  # the scaling matters


@pytest.mark.parametrize("kind", ROPES)
def test_the_native_step_has_the_angles_of_the_model(kind: str) -> None:
    model = model_with(kind, torch.bfloat16)
    if kind in ("dynamic", "longrope"):  # they depend on how long the text is: the model's own code makes them
        assert any(kind in reason for reason in around_reasons(model))
        return
    assert not around_reasons(model)
    positions = torch.tensor([[0, 5, 31, 32, 100, 127]])
    want = model.model.rotary_emb(torch.empty(0, dtype=torch.bfloat16), positions)
    for got, wanted in zip(Angles(model.model.rotary_emb).at(positions[0]), want, strict=True):
        assert_same(got, wanted[0].float())
