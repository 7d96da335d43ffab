"""What people do to a model after loading it is honoured by whole layers and accelerated modules, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fate_moe.errors import UnsupportedCallError
from fate_moe.kernels.native import native
from fate_moe.layers.cpu_step import CpuStep
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.layers.test_modules import difference, steps
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model

pytestmark = pytest.mark.skipif(native is None, reason="without the extension every module has its own forward")

LAYER = "model.layers.1"
PARTS = [
    "self_attn",
    "self_attn.q_proj",
    "mlp",
    "mlp.gate",
    "mlp.experts",
    "mlp.experts.act_fn",
    "mlp.shared_expert",
    "mlp.shared_expert.act_fn",
    "mlp.shared_expert.down_proj",
    "mlp.shared_expert_gate",
    "input_layernorm",
    "post_attention_layernorm",
]
Change = Callable[[Any], Callable[[], Any]]  # what it does to a model; returns what takes it back


@pytest.fixture(scope="module", params=["lossless", "int8"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """A model that runs whole layers, the same with every module's own forward, and the logits of some steps of the first."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = tiny_checkpoint("qwen2_moe", folder / "checkpoint", torch.bfloat16, hidden_size=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
        store = convert(checkpoint, folder / "store", request.param)
        fast = load_model(store, expert_cache="50%")
        patch.setenv("FATE_FUSE", "0")
        slow = load_model(store, expert_cache="50%")
    assert all(isinstance(layer.forward, CpuStep) for layer in fast.model.layers)
    yield fast, slow, steps(fast, 2)
    fast.fate.close()
    slow.fate.close()


def honoured(pair: tuple[Any, Any, torch.Tensor], change: Change) -> None:
    """``change`` does the same to both, it does something, and it leaves nothing behind."""
    fast, slow, before = pair
    results = []
    for model in (fast, slow):
        undo = change(model)
        results.append(steps(model, 2))
        undo()
    assert difference(*results) <= 0.03
    assert difference(results[0], before) > 0.03, "the change changes nothing"
    assert torch.equal(steps(fast, 2), before)


def tripled(x: Any) -> Any:
    """A module's output, or its first tensor, times three."""
    if isinstance(x, tuple):
        return (tripled(x[0]), *x[1:])
    return 3 * x


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_for_steering_is_called(pair: tuple[Any, Any, torch.Tensor], part: str, when: str) -> None:
    fast, slow, before = pair
    counts, results = [], []
    for model in (fast, slow):
        module, calls = model.get_submodule(f"{LAYER}.{part}"), list[int]()

        def steer(module: nn.Module, args: Any, output: Any = None, calls: list[int] = calls) -> Any:
            calls.append(1)
            return tripled(args) if output is None and args else tripled(output) if output is not None else None

        handle = module.register_forward_pre_hook(steer) if when == "before" else module.register_forward_hook(steer)
        results.append(steps(model, 2))
        handle.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    assert difference(*results) <= 0.03
    assert torch.equal(steps(fast, 2), before)


def test_a_hook_on_all_modules_sees_each_of_them(pair: tuple[Any, Any, torch.Tensor]) -> None:
    seen: list[list[str]] = []
    for model in pair[:2]:
        calls = list[str]()
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, calls=calls: calls.append(type(module).__name__)  # type: ignore[misc]
        )
        steps(model, 1)
        handle.remove()
        seen.append(sorted(calls))
    assert len(seen[0]) > 0
    assert [kind for kind in seen[0] if kind.startswith("Qwen")] == [kind for kind in seen[1] if kind.startswith("Qwen")]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["self_attn", "mlp", "mlp.gate", "mlp.experts", "mlp.shared_expert", "self_attn.q_proj"])
def test_a_forward_that_was_put_in_place_runs(pair: tuple[Any, Any, torch.Tensor], part: str) -> None:
    def change(model: Any) -> Callable[[], Any]:
        module = model.get_submodule(f"{LAYER}.{part}")
        had, forward = vars(module).get("forward"), module.forward
        module.forward = lambda *args, **kwargs: tripled(forward(*args, **kwargs))
        return (lambda: vars(module).pop("forward")) if had is None else (lambda: setattr(module, "forward", had))

    if part == "mlp.gate":
        return honoured(pair, lambda model: changed(model, "mlp.gate", "top_k", 1))
    return honoured(pair, change)


def changed(model: Any, part: str, name: str, value: Any) -> Callable[[], Any]:
    module = model.get_submodule(f"{LAYER}.{part}")
    old = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, old)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("mlp.gate", "top_k", 1),
        ("mlp.gate", "norm_topk_prob", True),
        ("input_layernorm", "variance_epsilon", 1.0),
        ("self_attn", "scaling", 3.0),
        ("mlp.experts", "act_fn", nn.ReLU()),
        ("mlp.shared_expert", "act_fn", nn.ReLU()),
    ],
)
def test_a_setting_that_was_changed_counts(pair: tuple[Any, Any, torch.Tensor], part: str, name: str, value: Any) -> None:
    honoured(pair, lambda model: changed(model, part, name, value))


def test_the_last_norms_eps_counts(pair: tuple[Any, Any, torch.Tensor]) -> None:
    def change(model: Any) -> Callable[[], Any]:
        old, model.model.norm.variance_epsilon = model.model.norm.variance_epsilon, 1.0
        return lambda: setattr(model.model.norm, "variance_epsilon", old)

    honoured(pair, change)


def test_training_mode_drops_out_attention(pair: tuple[Any, Any, torch.Tensor]) -> None:
    def change(model: Any) -> Callable[[], Any]:
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(0)

        def undo() -> None:
            model.eval()
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.0

        return undo

    honoured(pair, change)


def test_an_attention_function_of_the_users_own_runs(pair: tuple[Any, Any, torch.Tensor]) -> None:
    def twice(*args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return 2 * output, weights

    def change(model: Any) -> Callable[[], Any]:
        model.set_attn_implementation("twice")
        return lambda: model.set_attn_implementation("sdpa")

    ALL_ATTENTION_FUNCTIONS.register("twice", twice)
    honoured(pair, change)


class Tripled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 3 * weight


@pytest.mark.parametrize("part", ["input_layernorm", "mlp.gate", "mlp.shared_expert_gate", "self_attn.v_proj"])
def test_another_weight_is_used(pair: tuple[Any, Any, torch.Tensor], part: str) -> None:
    """Put in place of the old one, whether that is quantized or not."""
    honoured(pair, lambda model: _weight(model, part))


def _weight(model: Any, part: str) -> Callable[[], Any]:
    module = model.get_submodule(f"{LAYER}.{part}")
    old = module.weight
    module.weight = nn.Parameter(3 * old, requires_grad=False)
    return lambda: setattr(module, "weight", old)


def test_a_parametrized_weight_is_used(pair: tuple[Any, Any, torch.Tensor]) -> None:
    """By the norm and the router, whose weight the extension reads at an address; a copy, as this cannot be taken back whole."""
    norm, gate = (copy.deepcopy(pair[0].get_submodule(f"{LAYER}.{part}")) for part in ("input_layernorm", "mlp.gate"))
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for module, output in ((norm, norm(x)), (gate, gate(x[0])[0])):
            register_parametrization(module, "weight", Tripled())
            got = module(x) if module is norm else module(x[0])[0]
            assert not torch.equal(got, output)


def test_a_copied_module_has_its_own_weight(pair: tuple[Any, Any, torch.Tensor]) -> None:
    """As PEFT's modules_to_save trains: what was made for the original stays with it."""
    fast = pair[0]
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for part in ("input_layernorm", "mlp.gate"):
            module = fast.get_submodule(f"{LAYER}.{part}")
            other = copy.deepcopy(module)
            other.weight.data = torch.zeros_like(other.weight)
            rows = x[0] if part == "mlp.gate" else x
            outputs = [answer[0] if isinstance(answer, tuple) else answer for answer in (module(rows), other(rows))]
            assert outputs[0].std() > 0
            assert float(outputs[1].float().std()) < 1e-3 * float(outputs[0].float().std())


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda weight: weight.mul_(2),
    "copy_": lambda weight: weight.copy_(torch.ones(weight.shape)),
    "setitem": lambda weight: weight.__setitem__(0, 0),
    "init": nn.init.normal_,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_what_is_not_in_memory_is_refused(pair: tuple[Any, Any, torch.Tensor], edit: str) -> None:
    experts = pair[0].get_submodule(f"{LAYER}.mlp.experts").down_proj
    weights = [experts, experts.data, pair[0].get_input_embeddings().weight.data]
    projection = pair[0].get_submodule(f"{LAYER}.self_attn.q_proj").weight
    for weight in [*weights, *([projection.data, projection.detach()] if type(projection) is type(experts) else [])]:
        with pytest.raises(UnsupportedCallError, match=r"cannot be changed"), torch.no_grad():
            EDITS[edit](weight)


def test_gradient_mode_changes_no_bit(pair: tuple[Any, Any, torch.Tensor]) -> None:
    """Decoding with enable_grad, no_grad and in inference mode, one after the other in one cache too."""
    fast, _, before = pair
    tokens, logits = torch.randint(1, 128, (1, 5), generator=torch.Generator().manual_seed(0)), []
    past = None
    for step, mode in enumerate((torch.inference_mode, torch.enable_grad, torch.no_grad)):
        with mode():
            output = fast(tokens, past_key_values=past, use_cache=True)
        past, tokens = output.past_key_values, torch.tensor([[step + 7]])
        logits.append(output.logits[0, -1].float().detach())
    assert torch.equal(torch.stack(logits[1:]), before)


@pytest.mark.parametrize("mode", ["float64", "bfloat16", "inference", "autocast", "device"])
def test_modes_while_loading_change_nothing(tmp_path: Path, mode: str) -> None:
    """Kernels write to tensors that are made while loading: their dtype must not be torch's default of the moment."""
    checkpoint = tiny_checkpoint("qwen2_moe", tmp_path / "checkpoint", torch.bfloat16)
    plain = convert(checkpoint, tmp_path / "plain", "int4")
    model = load_model(plain)
    want = steps(model, 2)
    model.fate.close()
    modes: dict[str, Callable[[], Any]] = {
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu"),
        "device": lambda: torch.device("meta"),
    }
    try:
        if mode in modes:
            with modes[mode]():
                store = convert(checkpoint, tmp_path / "store", "int4")
                model = load_model(store)
        else:
            torch.set_default_dtype(getattr(torch, mode))
            store = convert(checkpoint, tmp_path / "store", "int4")
            model = load_model(store)
            assert torch.equal(steps(model, 2), want), "while running"
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(steps(model, 2), want)
    model.fate.close()
