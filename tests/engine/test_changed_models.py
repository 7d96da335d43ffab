"""A loaded model that its user changes: what transformers computes then, also where kernels run its layers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fate_moe.engine.prepare import store_for
from fate_moe.errors import UnsupportedCallError
from tests.support.calls import PROMPT, reference, write
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model, simulated_gpu

pytestmark = pytest.mark.slow


def replace_projection(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    new = nn.Linear(64, 64, dtype=model.dtype)
    new.weight.data.copy_(attention.q_proj.weight.data.flip(0))
    new.bias.data.zero_()
    attention.q_proj = new


def set_in_layers(part: str, name: str, value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            setattr(layer.get_submodule(part), name, value)

    return change


def add_to_head(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanhshrink())


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number


def prune(model: Any) -> None:
    pruning: Any = importlib.import_module("torch.nn.utils.prune")

    pruning.l1_unstructured(model.model.layers[0].self_attn.q_proj, "weight", 0.7)
    pruning.l1_unstructured(model.model.layers[1].input_layernorm, "weight", 0.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "top_k": set_in_layers("mlp.gate", "top_k", 1),
    "eps": set_in_layers("input_layernorm", "variance_epsilon", 5.0),
    "scaling": set_in_layers("self_attn", "scaling", 3.0),
    "layers swapped": swap_layers,
    "hook before a block": lambda m: m.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (-args[0],)),
    "hook after attention": lambda m: m.model.layers[0].self_attn.register_forward_hook(
        lambda mod, args, out: (-3 * out[0], out[1])
    ),
    "projection replaced": replace_projection,
    "head replaced": add_to_head,
    "pruned": prune,
    "norm in place": lambda m: m.model.layers[0].input_layernorm.weight.data.mul_(-0.5),
    "projection in place": lambda m: m.model.layers[0].self_attn.q_proj.weight.data.mul_(-2),
    "bias in place": lambda m: m.model.layers[0].self_attn.q_proj.bias.data.sub_(3),
    "router in place": lambda m: m.model.layers[1].mlp.gate.weight.data.neg_(),
    "shared gate in place": lambda m: m.model.layers[1].mlp.shared_expert_gate.weight.data.mul_(-3),
    "head in place": lambda m: m.lm_head.weight.data.neg_(),
    "norm loaded": lambda m: m.load_state_dict({"model.norm.weight": torch.linspace(-1, 1, 64, dtype=m.dtype)}, strict=False),
    "experts eager": lambda m: m.set_experts_implementation("eager"),
    "attention eager": lambda m: m.set_attn_implementation("eager"),
}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of the extension run its layers."""
    return tiny_checkpoint("qwen2_moe", tmp_path_factory.mktemp("bf16") / "qwen2_moe", torch.bfloat16)


def after_a_prompt(model: Any) -> torch.Tensor:
    """Logits of three tokens, one at a time: the path of decoding."""
    with torch.no_grad():
        cache, steps = model(PROMPT).past_key_values, []
        for token in (7, 71, 12):
            steps.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].float())
    return torch.stack(steps)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_after_loading_counts(name: str, bf16: Path) -> None:
    model, twin = load_model(store_for(bf16, "lossless")), reference(bf16)
    before = after_a_prompt(model)
    for each in (model, twin):
        CHANGES[name](each)
    got, want = after_a_prompt(model), after_a_prompt(twin)
    model.fate.close()
    near = 0.05 * want.norm()
    if not name.endswith("eager"):
        changed = (before - want).norm()
        assert changed > near, "a change that changes nothing"
        near = max(near, 0.4 * changed)  # rounded otherwise, a token may take another expert
    assert (got - want).norm() < near


@pytest.mark.parametrize("name", ["top_k", "projection replaced", "router in place"])  # each takes seconds there
def test_what_is_changed_after_loading_counts_on_a_gpu(name: str, checkpoint: Callable[[str], Path]) -> None:
    model, twin = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless")), reference(checkpoint("qwen2_moe"))
    for each in (model, twin):
        CHANGES[name](each)
    if name == "top_k":
        with pytest.raises(UnsupportedCallError, match="chose 1 experts for a token instead of 2"):
            write(model)
        model.fate.close()
        return
    assert write(model, num=2).tolist() == write(twin, num=2).tolist()
    assert (model.fate.decode.steps > 0) == name.endswith("in place")
    model.fate.close()


def test_a_cache_that_was_given_away_is_not_written_over_silently(checkpoint: Callable[[str], Path]) -> None:
    """A GPU has one captured cache: who goes on with an earlier sequence is told, who goes on with the last one may."""
    model, twin = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless")), reference(checkpoint("qwen2_moe"))
    went_on = []
    for each in (model, twin):
        first = write(each, num=2, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, torch.tensor([[9, 11]])], 1)
        went_on.append(write(each, longer, 1, past_key_values=first.past_key_values).tolist())
        write(each, PROMPT.flip(1), 1)
        if each is model:
            with pytest.raises(UnsupportedCallError, match="were given with an earlier result"):
                write(each, longer, 3, past_key_values=first.past_key_values)
    assert went_on[0] == went_on[1]
    model.fate.close()
