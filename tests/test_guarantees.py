"""Same numbers: offloading never changes a bit. (The budget is a promise: tests/engine/test_budget.py, test_memory_budget.py.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.engine.prepare import store_for
from fate_moe.registry import POLICIES, PREDICTORS
from fate_moe.store.learned import save_gates

NUM_RESIDENT = ("2", "7", "100%")  # of 2 layers x 8 experts, top-2: one token's experts, fewer than a layer, all
PAIRS = [(policy, "cross-layer") for policy in POLICIES] + [("co-activation", predictor) for predictor in PREDICTORS]


def logits_of(model: Any, batch: int) -> list[torch.Tensor]:
    """A prompt of 9 tokens (rows left-padded if there are several), then five decode steps, with a KV cache."""
    generator = torch.Generator().manual_seed(batch)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(1, vocabulary, (batch, 9), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    steps, past = [], None
    with torch.no_grad():
        for _ in range(6):
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            output = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
            steps.append(output.logits)
            past = output.past_key_values
            tokens = torch.randint(1, vocabulary, (batch, 1), generator=generator)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return steps


def cache_size(num_experts: str, slot_bytes: int) -> str | int:
    """A fraction as it is, a number of experts in bytes."""
    return num_experts if num_experts.endswith("%") else int(num_experts) * slot_bytes


@pytest.fixture(scope="module")
def resident() -> dict[Any, list[torch.Tensor]]:
    return {}


@pytest.mark.parametrize("num_resident", NUM_RESIDENT)
@pytest.mark.parametrize(("policy", "predictor"), PAIRS)
@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("qwen2_moe", "lossless"),
        pytest.param("qwen2_moe", "int4", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "lossless", marks=pytest.mark.slow),
    ],
)
def test_logits_are_bit_identical_to_fully_resident(
    loaded: Callable[..., Any],
    checkpoint: Callable[[str], Path],
    resident: dict[Any, Any],
    family: str,
    precision: str,
    policy: str,
    predictor: str,
    num_resident: str,
) -> None:
    if predictor in ("learned", "forecast"):
        generator = torch.Generator().manual_seed(7)
        gates, far, forecast = ([torch.randn(8, width, generator=generator) for _ in range(2)] for width in (65, 65, 129))
        save_gates(store_for(checkpoint(family), precision), gates, [None, far[1]], forecast=forecast)
    if (family, predictor) == ("deepseek_v3", "cross-layer-norm"):
        pytest.skip("its router is more than one matrix; that it is refused is in tests/predict")
    key = family, precision
    if key not in resident:
        whole = loaded(family, precision, policy="lru", predictor="none", expert_cache="100%")
        assert whole.fate.plan.num_slots == whole.fate.plan.num_experts
        resident[key] = {batch: logits_of(whole, batch) for batch in (1, 3)}
    slot_bytes = loaded(family, precision).fate.plan.slot_bytes
    model = loaded(
        family, precision, policy=policy, predictor=predictor, look_ahead=2, expert_cache=cache_size(num_resident, slot_bytes)
    )
    for batch in (1, 3):
        for step, (got, want) in enumerate(zip(logits_of(model, batch), resident[key][batch], strict=True)):
            assert torch.equal(got, want), f"batch {batch}, step {step}"
    counters = model.fate.report().experts
    assert counters.lookups > 0
    if not num_resident.endswith("%"):
        assert counters.misses > 0
        assert counters.bytes_read > model.fate.plan.expert_cache_bytes
    model.fate.runtime.residency.wait_idle()
    model.fate.runtime.residency.check_integrity()


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe", "qwen3_moe", "deepseek_v2"])
def test_every_family_is_bit_identical_at_one_tokens_experts(loaded: Callable[..., Any], family: str) -> None:
    whole = loaded(family, expert_cache="100%")
    small = loaded(family, expert_cache=2 * whole.fate.plan.slot_bytes)
    for batch in (1, 3):
        for got, want in zip(logits_of(small, batch), logits_of(whole, batch), strict=True):
            assert torch.equal(got, want)


def test_experts_never_exist_as_parameters(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    on_meta = {name for name, value in model.named_parameters() if value.device.type == "meta"}
    assert on_meta == {name for name, _ in model.named_parameters() if ".experts." in name}
    assert on_meta
