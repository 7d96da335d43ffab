"""Traces and fitted gates of the embedded model, made as the command line makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fate_moe import demo
from fate_moe.config import OffloadConfig
from fate_moe.errors import ConfigError
from fate_moe.store.convert import convert
from fate_moe.store.learned import load_gates
from fate_moe.tools import tracing
from fate_moe.tools.tracing import fit_gates, record_routing
from fate_moe.trace.recorded import recorded_run

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parents[1] / "data/heldout-books.txt").read_text("utf-8")
CONFIG = OffloadConfig(expert_cache="30%", context_length=256, preset="load-on-demand")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(demo.MODEL, tmp_path_factory.mktemp("tracing") / "store", "int4", solver="minmax")


def test_a_text_followed_is_routed_alike_in_decode_and_as_a_prompt(store: Path) -> None:
    """Decode and prompts differ by roundings only; times come with decode, router inputs with both."""
    options: dict[str, Any] = {"new_tokens": 40, "max_tokens": 40, "router_inputs": True}
    decoded = record_routing(store, [TEXT], CONFIG, teacher=True, **options)
    prompt = record_routing(store, [TEXT], CONFIG, prefill=True, **options)
    assert decoded.experts.shape == prompt.experts.shape == (40, 12, 4)
    assert (np.sort(decoded.experts) == np.sort(prompt.experts)).mean() > 0.8
    for trace in (decoded, prompt):
        scores = np.einsum("nld,led->nle", trace.extras["router_inputs"].astype(np.float32), trace.extras["routers"])
        best = np.argsort(-scores, axis=2)[:, :, :4]
        assert (np.sort(best) == np.sort(trace.experts)).mean() > 0.95, "a copy of another layer's input would choose otherwise"
    assert "lookups" not in prompt.extras
    recorded = recorded_run(decoded, 5)
    assert 0 < recorded.miss_rate < 1
    assert recorded.link.bytes_per_second > 0
    assert decoded.meta["policy"] == CONFIG.policy_name


def test_several_prompts_are_as_many_generations(store: Path) -> None:
    trace = record_routing(store, ["Once upon a time", "The house was"], CONFIG, new_tokens=5, max_tokens=100)
    assert trace.start.tolist() == [0, 4, 8], "the first token of each comes from its prompt"
    with pytest.raises(ConfigError, match="nothing was recorded"):
        record_routing(store, ["Once"], CONFIG, new_tokens=1, max_tokens=100)


def test_gates_are_fitted_and_saved(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "WINDOW", 32)
    found = fit_gates(store, [TEXT], CONFIG, max_tokens=1024, forecast=True, test_texts=[TEXT[-2000:]], test_tokens=64)
    assert (found["fitted_tokens"], found["tested_tokens"]) == (928, 64)
    recall = found["by_ahead"][0]["fitted"][4]["mean"]
    assert 0.2 < recall < 1
    gates = load_gates(store, [60] * 12, 256)
    assert gates is not None
    assert all(isinstance(gate, torch.Tensor) for gate in gates.ahead[0])
    assert len(gates.forecast) == 12
    with pytest.raises(ConfigError, match="too few to fit gates"):
        fit_gates(store, ["short"], CONFIG, max_tokens=1024)
