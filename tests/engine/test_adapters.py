"""PEFT adapters on a loaded model: the text is that of transformers with the same adapter; trained, switched, saved, merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.support.training import TOKENS, adapted, error, fill, reference

pytestmark = pytest.mark.slow


def lora(targets: list[str], r: int = 2) -> LoraConfig:
    return LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM")


def text(model: Any) -> list[int]:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    return list(model.generate(input_ids=TOKENS[:1], **options)[0].tolist())


def train(model: Any, num_steps: int = 20) -> dict[str, torch.Tensor]:
    """The loss of each step."""
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.2)
    model.train()
    losses = []
    for _ in range(num_steps):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    return {"losses": torch.stack(losses)}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_a_training_loop_is_transformers_own(checkpoint: Callable[[str], Path], loaded: Callable[..., Any], family: str) -> None:
    config = lora(["o_proj"])
    ours = adapted(loaded(family, expert_cache="30%"), config)
    twins = {dtype: adapted(reference(checkpoint(family), dtype), config) for dtype in (torch.float32, torch.float64)}
    got, (own, true) = train(ours), (train(twin) for twin in twins.values())
    assert true["losses"][-1] < 0.8 * true["losses"][0], "nothing is learned; the comparison would prove little"
    assert error(got, true) <= 3 * error(own, true) + torch.finfo(torch.float32).eps
    assert text(ours) == text(twins[torch.float32])


def test_switched_saved_and_merged(checkpoint: Callable[[str], Path], loaded: Callable[..., Any], tmp_path: Path) -> None:
    twin = adapted(reference(checkpoint("qwen2_moe")), lora(["q_proj", "v_proj"]))
    base = loaded("qwen2_moe", expert_cache="30%")
    ours = adapted(base, lora(["q_proj", "v_proj"]))
    first = text(twin)
    assert text(ours) == first
    with ours.disable_adapter(), twin.disable_adapter():
        assert text(ours) == text(twin) != first
    for model in (ours, twin):
        model.add_adapter("second", lora(["k_proj", "gate_proj"], r=3))
        model.set_adapter("second")
        fill(model)
    assert text(ours) == text(twin) != first
    for model in (ours, twin):
        model.set_adapter("default")
    assert text(ours) == first
    ours.save_pretrained(tmp_path)
    for size in ("100%", "15%"):
        again: Any = PeftModel.from_pretrained(loaded("qwen2_moe", expert_cache=size), tmp_path)
        assert text(again) == first
    again.merge_adapter()
    assert text(again) == first
    again.unmerge_adapter()
    assert text(again.merge_and_unload()) == first


def test_a_router_with_an_adapter_chooses_by_it(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    """Without gradients too, where the router has been asked early, without the adapter."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["gate.weight"])
    ours, twin = (adapted(model, config) for model in (loaded("qwen2_moe"), reference(checkpoint("qwen2_moe"))))
    with torch.no_grad():
        got, want = ours(TOKENS).logits, twin(TOKENS).logits
        with twin.disable_adapter():
            assert (twin(TOKENS).logits - want).abs().max() > 1e-3, "the adapter changes nothing"
    assert (got - want).abs().max() <= 1e-5


def test_a_whole_state_dict_may_be_loaded(
    checkpoint: Callable[[str], Path], loaded: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As people copy adapters: what is not in memory is left as the store has it, and that is said."""
    twin = adapted(reference(checkpoint("qwen2_moe")), lora(["q_proj"]))
    ours = adapted(loaded("qwen2_moe"), lora(["q_proj"]))
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if "lora" in name:
                value.zero_()
    assert ours.load_state_dict(twin.state_dict(), strict=False).unexpected_keys == []
    assert text(ours) == text(twin)
    assert "mlp.experts as the store has it" in caplog.text
