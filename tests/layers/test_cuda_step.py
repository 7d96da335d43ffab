"""The GPU path on tiny transformers models, on a simulated device: same numbers as transformers, and as fully resident."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fate_moe.adapter.kv_cache import whole_cache
from fate_moe.adapter.meta_model import expert_stacks
from fate_moe.engine.cuda_attach import attach_device, router_weights
from fate_moe.engine.patches import Patches
from fate_moe.errors import UnsupportedModelError
from fate_moe.gpu.dense import ByteLinear
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.layout import device_layout
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.state import DeviceState
from fate_moe.gpu.tables import ResidencyTables, layer_quotas
from fate_moe.layers.cuda_step import FusedStep
from fate_moe.layers.reasons import cuda_reasons
from fate_moe.quant.blob import encode
from fate_moe.store.format import blob_layout
from tests.support import tiny
from tests.support.checkpoints import FAMILIES, tiny_model
from tests.support.plain_twin import twin_logits

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def on_device(model: Any, num_slots: int, fitted: Any = (), **options: Any) -> DeviceExperts:
    """Move ``model``'s experts into an arena, losslessly, and run them from ``num_slots`` slots."""
    stacks = expert_stacks(model)
    shapes = stacks[0].output_rows_first()
    layout = blob_layout("lossless", shapes, "F32")
    experts, top_k = stacks[0].num_experts, model.config.num_experts_per_tok
    arena = PinnedArena(len(stacks) * experts, layout.length, CPU)
    for stack in stacks:
        module = model.get_submodule(stack.name)
        for number in range(experts):
            blob = encode(layout, {name: getattr(module, name)[number].detach() for name in shapes})
            arena.blob(stack.layer * experts + number).copy_(torch.frombuffer(blob, dtype=torch.uint8))
    chosen = DeviceOptions(**options)
    tables = ResidencyTables(layer_quotas(num_slots, len(stacks), experts, top_k + chosen.limit, chosen.num_whole), experts, CPU)
    pool = VramPool(tables.num_slots, 4, layout.length, CPU)
    layouts = [device_layout(layout, shapes, model.get_submodule(stack.name)) for stack in stacks]
    state = DeviceState(layouts, arena, pool, tables, router_weights(model, stacks), top_k=top_k, options=chosen, fitted=fitted)
    state.fill()
    device = DeviceExperts(state)
    attach_device(model, stacks, device, Patches(model))
    return device


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
PROMPT = torch.tensor([[3, 17]])  # before the first step, each costs as much as one


def fused_logits(
    model: Any, num_slots: int, steps: int, prompt: torch.Tensor = PROMPT, **options: Any
) -> tuple[torch.Tensor, list[int], DeviceExperts]:
    """Logits [steps, vocabulary] and tokens after PROMPT, by fused steps."""
    device = on_device(model, num_slots, **options)
    cache = whole_cache(model.config, 32)
    with torch.no_grad():
        first = int(model(prompt, past_key_values=cache).logits[0, -1].argmax())
    fused = FusedStep(model, device, cache)
    fused.begin(first, prompt.shape[1])
    rows = []
    for _ in range(steps):
        fused.step()
        rows.append(fused.logits.clone())
    device.state.tables.check_integrity()
    return torch.stack(rows), [first, *fused.tokens[prompt.shape[1] + 1 :][:steps].tolist()], device


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1], "attention_bias": True, "rope_parameters": LINEAR}),
        ("qwen2_moe", {}),
        ("mixtral", {"sliding_window": 3}),
        ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True}),
        ("glm4_moe", {}),
        ("ernie4_5_moe", {}),
        ("phimoe", {}),
        ("hy_v3", {}),
    ],
)
def test_fused_steps_are_the_models_own(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, **options) if family in FAMILIES else of_two_layers(family)
    assert cuda_reasons(model) == []
    prompt = torch.tensor([[3, 17, 40, 9][: 4 if options.get("sliding_window") else 2]])
    logits, tokens, _ = fused_logits(model, num_slots=7, steps=2, prompt=prompt)
    sequence = [*prompt[0].tolist(), *tokens[:-1]]
    with torch.no_grad():
        whole = model(torch.tensor([sequence])).logits[0, -2:]  # through the same experts, no cache
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert tokens[1:] == whole.argmax(-1).tolist()
    if family in ("qwen2_moe", "mixtral"):
        torch.testing.assert_close(logits, twin_logits(model, torch.tensor(sequence))[-2:], rtol=1e-4, atol=1e-4)


def of_two_layers(family: str) -> Any:
    """A tiny model's first two layers, of which the first may be dense."""
    model = tiny.tiny_model(family).float()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(model.config, name, None):
            setattr(model.config, name, getattr(model.config, name)[:2])
    return model


def test_same_numbers_for_every_budget_and_option() -> None:
    exact, tokens, device = fused_logits(tiny_model("qwen3_moe"), num_slots=16, steps=2)
    assert device.state.counters().misses == 0
    for slots, options in (
        (4, {"limit": 0}),
        (6, {"eviction": "recency"}),
        (10, {"overlap": False, "num_whole": 1}),
        (7, {"eviction": "probability"}),
    ):
        logits, same, device = fused_logits(tiny_model("qwen3_moe"), num_slots=slots, steps=2, **options)
        assert torch.equal(logits, exact)
        assert same == tokens
        assert device.state.counters().misses > 0


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_fitted_gate_says_who_comes_early_and_changes_no_number(family: str) -> None:
    exact, tokens, _ = fused_logits(tiny_model(family), num_slots=16, steps=2)
    config = tiny_model(family).config
    for expert in (3, 5, 7):  # one at least that the prompt has not left in a slot
        gate = torch.zeros(config.num_experts, config.hidden_size + 1)
        gate[expert, -1] = 1.0
        logits, same, device = fused_logits(tiny_model(family), num_slots=8, steps=2, fitted=[None, gate], num_predicted=1)
        assert torch.equal(logits, exact)
        assert same == tokens
        if prefetched := device.state.counters().prefetched:
            break
    assert prefetched > 0


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_dense_weights_of_one_byte(family: str) -> None:
    def rounded() -> Any:
        model = tiny_model(family)
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and "expert_gate" not in name:  # the fused step has it among the routers
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ByteLinear.rounded(module.weight.data, module.bias))
        return model

    model = rounded()
    logits, tokens, _ = fused_logits(model, num_slots=7, steps=2)
    with torch.no_grad():  # transformers' own layers on the same numbers
        whole = model(torch.tensor([[*PROMPT[0].tolist(), *tokens[:-1]]])).logits[0, 2:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("deepseek_v2", {}, "its keys and values are latent rows"),
        ("qwen3_moe", {"head_dim": 24}, "model.layers.*: its heads have 24 channels, which is no power of two"),
        ("qwen3_moe", {"hidden_act": "gelu", "mlp_only_layers": [1]}, "model.layers.*: its MLP's activation is gelu"),
        ("qwen2_moe", {"hidden_act": "gelu"}, "model.layers.*: its MLP's activation is gelu"),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "depend on the length"),
    ],
)
def test_other_models_say_every_reason(family: str, options: dict[str, Any], reason: str) -> None:
    model = tiny_model(family, **options)
    reasons = cuda_reasons(model)
    assert any(reason in each for each in reasons), reasons
    with pytest.raises(UnsupportedModelError, match="no fused decode step"):
        FusedStep(model, None, None)  # type: ignore[arg-type]
