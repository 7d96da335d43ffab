"""Modules and layers that run in one call: they are found, they give what the family's own forward gives, they stand back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from fate_moe.core import ExpertId, Need, PrecisionPolicy
from fate_moe.engine.patches import Patches
from fate_moe.kernels.native import native
from fate_moe.kernels.plain_layer import Norm, PlainLayer
from fate_moe.layers import modules
from fate_moe.layers.attentions import native_attention
from fate_moe.layers.cpu_step import CpuStep
from fate_moe.layers.frozen import FrozenWeight
from fate_moe.layers.modules import accelerate, accelerated_by
from fate_moe.layers.plain import plain_decoder
from fate_moe.layers.snapshot import StandIn
from fate_moe.layers.weights import SmallWeight
from fate_moe.memory.precision import Budget, PrefillPopularity, RoutingWeighted
from fate_moe.predict.prefetcher import Prefetcher
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.support.checkpoints import tiny_model
from tests.support.engines import load_model

pytestmark = pytest.mark.slow

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

PLAIN = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module", params=["lossless", "int8"])
def store_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bf16 store of a family, with dense weights of the precision; made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny_model(family, torch.bfloat16)
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
            model.save_pretrained(folder / "checkpoint")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
                made[family] = convert(folder / "checkpoint", folder / "store", "int4", dense_precision=request.param)
        return made[family]

    return make


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models' matrices are worth quantizing too."""
    monkeypatch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)


def steps(model: Any, count: int = 6, **options: Any) -> torch.Tensor:
    """Logits [count, vocabulary] of single tokens after a prompt of five."""
    past, logits = None, []
    tokens = torch.randint(1, 128, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for step in range(count + 1):
            output = model(tokens, past_key_values=past, use_cache=True, **options)
            past, tokens = output.past_key_values, torch.tensor([[step + 7]])
            logits.append(output.logits[0, -1].float())
    return torch.stack(logits[1:])


def plain(monkeypatch: pytest.MonkeyPatch, store: Path, **options: Any) -> Any:
    """The model with every module's own forward."""
    with monkeypatch.context() as patch:
        patch.setenv("FATE_FUSE", "0")
        return load_model(store, **options)


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the norm of the logits, median over the tokens: one whose two best experts are nearly equal may be routed otherwise."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


@pytest.mark.parametrize("family", PLAIN)
def test_plain_families_run_whole_layers(store_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Near the family's own forward; nearer than a layer's norms are to each other."""
    options = {"expert_cache": "50%", "exact_activations": True}
    model, own = load_model(store_of(family), **options), plain(monkeypatch, store_of(family), **options)
    assert all(isinstance(layer.forward, CpuStep) for layer in model.model.layers)
    got, want = steps(model), steps(own)
    assert difference(got, want) <= 0.03
    for layer in own.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm
    assert difference(steps(own), want) > 0.06, "the comparison would not see a wrong norm"
    model.fate.close()
    own.fate.close()


@pytest.mark.parametrize("normalize", [True, False])
def test_how_experts_are_weighed_is_read_from_the_router(tmp_path: Path, normalize: bool) -> None:
    """Even where numbers could not tell: a router that is sure of every token gives weights that add up to 1 by themselves."""
    model = tiny_model("qwen3_moe", torch.bfloat16, norm_topk_prob=normalize)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(1000)
            layer.self_attn.o_proj.weight.mul_(1000)
    model.save_pretrained(tmp_path / "checkpoint")
    store = convert(tmp_path / "checkpoint", tmp_path / "store", "int4", dense_precision="lossless")
    loaded = load_model(store)
    for layer, own in zip(loaded.model.layers, model.model.layers, strict=True):
        assert isinstance(layer.forward, CpuStep)
        assert layer.forward.plain.router.normalize is normalize
        assert torch.equal(layer.mlp.gate.weight, own.mlp.gate.weight), "the check at load time left the router as it was"
    loaded.fate.close()


class Mistaken(StandIn):
    """Does what ``original`` does, and says that it is another thing."""

    def __init__(self, original: Any, of: Any) -> None:
        self.original, self.of = original, of

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("part", ["router", "scaling", "eps"])
def test_a_layer_that_differs_from_what_was_recognised_is_refused_loudly(
    store_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """Another meaning than the family's own: a warning with the layer and the difference, and the family's forward stays."""

    def mistaken(model: Any) -> list[Any]:
        return [one_mistaken(model, found) for found in plain_decoder(model)]

    def one_mistaken(model: Any, found: Any) -> Any:
        assert isinstance(found, PlainLayer)
        if part == "router":
            return replace(found, router=replace(found.router, normalize=not found.router.normalize))
        if part == "scaling":  # of the accelerated attention, which the layer uses
            attention = found.attention
            layer = model.get_submodule(found.path)
            wrong = native_attention(layer.self_attn, replace(attention, scaling=8 * attention.scaling))
            layer.self_attn.forward = Mistaken(layer.self_attn.forward, wrong)
            return found
        return replace(found, input_norm=replace(found.input_norm, eps=1.0), post_norm=replace(found.post_norm, eps=1.0))

    monkeypatch.setattr("fate_moe.layers.cpu_step.plain_decoder", mistaken)
    with caplog.at_level(logging.WARNING):
        model = load_model(store_of("qwen2_moe"))
    assert not any(isinstance(layer.forward, CpuStep) for layer in model.model.layers)
    said = [record.getMessage() for record in caplog.records if "keeps its own forward" in record.getMessage()]
    assert len(said) == len(model.model.layers)
    assert "model.layers.0 keeps its own forward: what " in said[0]
    assert "% of its norm" in said[0]
    model.fate.close()


def test_budgets_change_no_bit_in_layers_that_run_whole(store_of: Callable[[str], Path]) -> None:
    results = []
    for options in ({"expert_cache": "100%"}, {"expert_cache": "20%"}, {"expert_cache": "40%", "preset": "fate"}):
        model = load_model(store_of("qwen2_moe"), **options)
        results.append(steps(model, 12))
        model.fate.close()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


class Fixed:
    """Every expert as the view of so many bits."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        return [self._bits] * len(needs)


POLICIES: dict[str, PrecisionPolicy] = {
    "2": Fixed(2),
    "3": Fixed(3),
    "gate": RoutingWeighted(),
    "budget": Budget(),
    "prefill": PrefillPopularity(),
}


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert in the time of a layer, so that ``Budget`` does not depend on the clock."""
    monkeypatch.setattr(Prefetcher, "affordable", lambda self, num_tokens: 1.0)


class Decoded:
    """24 single tokens of ``model`` with ``policy``, which read a prompt before for another text: what came of them."""

    def __init__(self, model: Any, policy: PrecisionPolicy | None) -> None:
        runtime = model.fate.runtime
        self.decisions: list[tuple[list[int], Any]] = []  # by layer of each token: the experts in routing order, what is wanted
        self.slow = 0  # layers that went the family's own way
        runtime.view_selector.policy = policy
        with torch.inference_mode():
            model(torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(0)))
            past = model(torch.tensor([[3]]), use_cache=True).past_key_values
        before = runtime.view_selector.by_bits()
        logits = []
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(runtime.view_selector, "sections", self._deciding(runtime.view_selector.sections))
            patch.setattr(runtime, "compute", self._computing(runtime.compute))
            for token in range(7, 31):
                logits.append(model(torch.tensor([[token]]), past_key_values=past, use_cache=True).logits[0, -1].float())
        runtime.residency.check_integrity()
        self.logits = torch.stack(logits)
        self.uses = {bits: n for bits, count in runtime.view_selector.by_bits().items() if (n := count - before.get(bits, 0))}
        model.fate.close()

    def _deciding(self, sections: Any) -> Any:
        def wrapper(layer: int, rows: dict[int, Any], *args: Any) -> Any:
            wanted = sections(layer, rows, *args)
            self.decisions.append((list(rows), wanted))
            return wanted

        return wrapper

    def _computing(self, compute: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            self.slow += 1
            return compute(*args)

        return wrapper


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.usefixtures("slow_link")
def test_precision_policies_run_whole_layers(store_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As the family's own forward with the same policy: it decides the same of the same experts, and gives nearly the same."""
    options = {"expert_cache": "40%", "preset": "load-on-demand", "exact_activations": True}
    store, policy = store_of("qwen2_moe"), POLICIES[name]
    got, full = Decoded(load_model(store, **options), policy), Decoded(load_model(store, **options), None)
    want = Decoded(plain(monkeypatch, store, **options), policy)
    assert got.slow == 0
    assert want.slow == len(want.decisions) == len(got.decisions) == 2 * 24
    assert difference(got.logits, want.logits) <= 0.03
    # Until a token whose two best experts are nearly equal is routed otherwise, or one's weight is at a limit: from there on other
    # experts are held.
    alike = list(takewhile(lambda pair: pair[0] == pair[1], zip(got.decisions, want.decisions, strict=True)))
    assert len(alike) >= 8
    assert sum(got.uses.values()) == sum(want.uses.values()) == 2 * 2 * 24
    if name == "prefill":
        assert got.uses == full.uses == {4: 2 * 2 * 24}
        assert torch.equal(got.logits, full.logits), "what the prompt read short is read to its end"
    else:
        assert min(got.uses) < 4
        assert difference(got.logits, full.logits) > 0.05, "the comparison would not see whole experts"


@pytest.mark.parametrize("policy", [None, RoutingWeighted()])
@pytest.mark.parametrize("kept", ["int8", "lossless"])
def test_layers_of_several_precisions_run_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: str, policy: PrecisionPolicy | None
) -> None:
    tiny_model("qwen2_moe", torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    keep: dict[int | ExpertId, str] = {ExpertId(layer, expert): kept for layer in (0, 1) for expert in (0, 3, 5)}
    store = convert(tmp_path / "checkpoint", tmp_path / "store", "int4", precision_rules=keep)
    options = {"expert_cache": "40%", "preset": "load-on-demand", "exact_activations": True}
    got, want = Decoded(load_model(store, **options), policy), Decoded(plain(monkeypatch, store, **options), policy)
    assert (got.slow, want.slow) == (0, 2 * 24)
    assert difference(got.logits, want.logits) <= 0.03
    assert got.uses.keys() == want.uses.keys() == {4, {"int8": 8, "lossless": 16}[kept], *([2] if policy else [])}


def test_other_calls_go_the_familys_own_way(store_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, recorded outputs, hooks on a layer's parts, an observer: each sees what it would without us."""
    model, own = load_model(store_of("qwen2_moe")), plain(monkeypatch, store_of("qwen2_moe"))
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    got, want = (torch.stack(each.generate(tokens, **options).logits).float() for each in (model, own))
    assert difference(got, want) <= 0.03
    seen: list[Any] = []
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    steps(model, 2)
    handle.remove()
    assert len(seen) == 3
    with torch.inference_mode():
        past = model(tokens[:1], use_cache=True).past_key_values
        output = model(tokens[:1, :1], past_key_values=past, use_cache=True, output_router_logits=True, output_hidden_states=True)
    assert [len(output.router_logits), len(output.hidden_states)] == [2, 3]
    model.fate.close()
    own.fate.close()


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.shared_expert.up_proj", "mlp.gate", "input_layernorm"])
def test_a_replaced_part_is_used(store_of: Callable[[str], Path], part: str) -> None:
    """As adapters do: another module in the place of one that was found; and a hook on it is called."""
    model = load_model(store_of("qwen2_moe"))
    want, seen = steps(model, 2), list[Any]()
    handle = model.model.layers[1].get_submodule(part).register_forward_hook(lambda module, args, output: seen.append(args))
    assert difference(steps(model, 2), want) <= 0.03
    handle.remove()
    assert len(seen) == 3
    owner, _, name = part.rpartition(".")
    old = getattr(model.model.layers[1].get_submodule(owner), name)

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            output = old(x)
            return tuple(y.flip(-1) for y in output) if isinstance(output, tuple) else 0 * output

    setattr(model.model.layers[1].get_submodule(owner), name, Nothing())
    assert difference(steps(model, 2), want) > 0.001
    model.fate.close()


def test_numbers_that_move_are_followed(store_of: Callable[[str], Path]) -> None:
    """Numbers that were put elsewhere leave the addresses that the extension was given, which may hold anything then."""
    model = load_model(store_of("qwen2_moe"))
    want = steps(model, 3)
    for parameter in model.parameters():
        if not isinstance(parameter, FrozenWeight):
            old, parameter.data = parameter.data, parameter.data.clone()
            old.zero_()
    assert difference(steps(model, 3), want) <= 0.04
    model.fate.close()


class CopiedNorm(nn.Module):
    """The code that transformers copies into its families, and with one line changed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(32) + 0.5), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Names and this text do not count."""
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * x.to(dtype)


class ChangedNorm(CopiedNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return (1.0 + self.weight) * x.to(dtype)


class TwoNorms(nn.Module):
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.usual, self.unusual = CopiedNorm(), ChangedNorm()


def test_an_unusual_norm_keeps_its_own_forward() -> None:
    model = TwoNorms()
    patches = Patches(model)
    assert accelerate(model, False, patches) == {"norms": 1}
    assert accelerated_by(model.usual) == Norm(1e-6)
    assert accelerated_by(model.unusual) is None
    patches.undo()
    assert vars(model.usual).keys() == vars(CopiedNorm()).keys()


def test_a_norm_that_does_not_give_what_its_code_says_is_refused_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = TwoNorms()
    monkeypatch.setattr(modules, "recognise_norm", lambda module: Norm(1e-6))
    with caplog.at_level(logging.WARNING):
        assert accelerate(model, False, Patches(model)) == {"norms": 1}
    (record,) = caplog.records
    assert record.getMessage().startswith("unusual keeps its own forward: the kernel's result differs")


def test_a_small_matrix_multiplies_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((10, 96), (2, 1, 96)))
    ready = SmallWeight.of(weight)
    got, want = linear(x, ready), x.double() @ weight.double().T
    assert type(got) is torch.Tensor
    assert got.shape == (2, 1, 10)
    assert (got.double() - want).abs().max() <= torch.finfo(torch.bfloat16).eps * want.abs().max()
    for other in (x.expand(40, 2, 1, 96), x.float()):  # many rows, another type: torch's own
        torch.testing.assert_close(linear(other, ready.to(other.dtype)), linear(other, weight.to(other.dtype)))
    assert (ready + 1).shape == weight.shape
