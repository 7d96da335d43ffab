"""Gradients through a loaded model against transformers' own, under every way to ask for them; and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from fate_moe.errors import UnsupportedCallError
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.support.checkpoints import FAMILIES, tiny_checkpoint
from tests.support.engines import load_model
from tests.support.training import (
    ATTENTION,
    TOKENS,
    Gradients,
    adapted,
    as_exact,
    collected,
    error,
    gradients,
    numbers_of,
    reference,
)

EXPERTS = "the experts' weights stay in the store"
QUANTIZED = "a quantized weight cannot be changed"
LORA = partial(LoraConfig, r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LM: Any = {"task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA on attention": lambda: LoraConfig(r=2, target_modules=ATTENTION),
    "LoRA on shared experts": lambda: LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]),
    "LoRA on all-linear": lambda: LoraConfig(r=2, target_modules="all-linear", **LM),
    "LoRA on routers": lambda: LoraConfig(r=2, target_modules=[], target_parameters=["gate.weight"]),
    "LoRA on the embedding": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "o_proj"]),
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, target_modules=ATTENTION),
    "VeRA": lambda: VeraConfig(r=2, target_modules=["o_proj"], **LM),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], **LM),
    "soft prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, **LM),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, **LM),
    "norms": lambda: LNTuningConfig(target_modules=["norm", "input_layernorm"], **LM),
    "a trained copy of the router and a norm": lambda: LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate", "norm"]),
}


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models' matrices are worth quantizing too."""
    monkeypatch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and a store of it with int4 experts and int8 matrices."""
    folder = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
        checkpoint = tiny_checkpoint("qwen2_moe", folder / "checkpoint")
        return checkpoint, convert(checkpoint, folder / "store", "int4")


def both(checkpoint: Path, ours: Any, config: Callable[[], Any], run: Callable[[Any], Gradients] = gradients) -> None:
    """``run`` gives on ours, with the adapter of ``config``, what it gives on transformers' model."""
    as_exact(run, adapted(ours, config()), lambda dtype: adapted(reference(checkpoint, dtype), config()))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_attention_trains_as_with_transformers(
    checkpoint: Callable[[str], Path], loaded: Callable[..., Any], family: str
) -> None:
    both(checkpoint(family), loaded(family, expert_cache="30%"), METHODS["LoRA on attention"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_adapters_train_as_with_transformers(checkpoint: Callable[[str], Path], loaded: Callable[..., Any], method: str) -> None:
    both(checkpoint("qwen2_moe"), loaded("qwen2_moe", expert_cache="30%"), METHODS[method])


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "VeRA"])
def test_beside_quantized_weights_gradients_are_those_of_their_numbers(
    quantized: tuple[Path, Path], small_counts: None, method: str
) -> None:
    """int8 matrices and int4 experts; with fp32 activations, as rounding these counts as none."""
    folder, store = quantized
    model = load_model(store, expert_cache="30%", exact_activations=True)
    twins = {dtype: numbers_of(model, folder, dtype) for dtype in (torch.float32, torch.float64)}
    as_exact(gradients, adapted(model, METHODS[method]()), lambda dtype: adapted(twins[dtype], METHODS[method]()))
    model.fate.close()


def test_rounded_activations_count_as_not_rounded(quantized: tuple[Path, Path], small_counts: None) -> None:
    """By default activations are int8: the loss moves by their rounding, and no gradient is lost in it."""
    folder, store = quantized
    model = load_model(store, expert_cache="30%")
    want = gradients(adapted(numbers_of(model, folder, torch.float32), LORA()))
    assert error(gradients(adapted(model, LORA())), want) < 0.2
    model.fate.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """All experts are chosen: a rounding that changes a choice would say nothing about gradients."""
    folder = tiny_checkpoint("qwen2_moe", tmp_path / "checkpoint", dtype, num_experts_per_tok=8)
    model = load_model(convert(folder, tmp_path / "store"))
    both(folder, model, METHODS["LoRA on attention"])
    model.fate.close()


def saliency(model: Any) -> Gradients:
    embeds = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).to(model.dtype).requires_grad_()
    model(inputs_embeds=embeds, labels=TOKENS[:, :7]).loss.backward()
    assert embeds.grad is not None
    return {"embeds": embeds.grad}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_saliency(checkpoint: Callable[[str], Path], loaded: Callable[..., Any], family: str) -> None:
    as_exact(saliency, loaded(family, expert_cache="30%"), partial(reference, checkpoint(family)))


def test_saliency_of_one_token_and_through_a_cache(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    def run(model: Any) -> Gradients:
        embeds = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).to(model.dtype).requires_grad_()
        first = model(inputs_embeds=embeds, use_cache=True)
        second = model(torch.tensor([[9]]), past_key_values=first.past_key_values)
        (first.logits[0, -1, 5] + second.logits[0, -1, 7]).backward()
        assert embeds.grad is not None
        return {"embeds": embeds.grad}

    as_exact(run, loaded("qwen2_moe", expert_cache="30%"), partial(reference, checkpoint("qwen2_moe")))


def test_routers_and_norms_of_the_model_can_be_trained(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    def run(model: Any) -> Gradients:
        for name, value in model.named_parameters():
            value.requires_grad_("mlp.gate.weight" in name or "norm" in name)
        return gradients(model, TOKENS[:1, :1].repeat(1, 3))  # few rows: those of the kernels

    as_exact(run, loaded("qwen2_moe", expert_cache="30%"), partial(reference, checkpoint("qwen2_moe")))


def checkpointed(reentrant: bool) -> Callable[[Any], Gradients]:
    def run(model: Any) -> Gradients:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return gradients(model, use_cache=False)

    return run


def two_forwards_first(model: Any) -> Gradients:
    first, second = model(TOKENS, labels=TOKENS).loss, model(TOKENS.flip(1), labels=TOKENS).loss
    second.backward()
    first.backward()
    return collected(model)


def twice_over_one_graph(model: Any) -> Gradients:
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward(retain_graph=True)
    loss.backward()
    return collected(model)


def accumulated(model: Any) -> Gradients:
    for start in range(3):
        part = TOKENS[:, start : start + 6]
        model(part, labels=part).loss.backward()
    return collected(model)


def by_autograd_grad(model: Any) -> Gradients:
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(model(TOKENS, labels=TOKENS).loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def with_anomaly_mode(model: Any) -> Gradients:
    with torch.autograd.detect_anomaly(check_nan=True):
        return gradients(model)


def dropped_out(model: Any) -> Gradients:
    model.train()
    torch.manual_seed(0)
    return gradients(model)


WAYS: dict[str, Callable[[Any], Gradients]] = {
    "reentrant checkpointing": checkpointed(True),
    "checkpointing": checkpointed(False),
    "two forwards, then two backwards": two_forwards_first,
    "retain_graph": twice_over_one_graph,
    "accumulation": accumulated,
    "autograd.grad": by_autograd_grad,
    "anomaly mode": with_anomaly_mode,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_ask_for_gradients(checkpoint: Callable[[str], Path], loaded: Callable[..., Any], way: str) -> None:
    both(checkpoint("qwen2_moe"), loaded("qwen2_moe", expert_cache="30%"), LORA, WAYS[way])


def test_dropout_draws_the_same_numbers(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    """On attention and routers: in training no router is asked before its turn."""
    config = partial(LORA, lora_dropout=0.2)
    want = dropped_out(adapted(reference(checkpoint("qwen2_moe")), config()))
    assert error(dropped_out(adapted(loaded("qwen2_moe", expert_cache="30%"), config())), want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_model(tmp_path: Path, dtype: torch.dtype) -> None:
    def run(model: Any) -> Gradients:
        with torch.autocast("cpu", dtype=dtype, enabled=model.dtype != torch.float64):
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        return collected(model)

    folder = tiny_checkpoint("qwen2_moe", tmp_path / "checkpoint", num_experts_per_tok=8)
    model = load_model(convert(folder, tmp_path / "store"))
    both(folder, model, LORA, run)
    model.generate(TOKENS, max_new_tokens=2, pad_token_id=0)
    with torch.autocast("cpu", dtype=dtype):
        model.generate(TOKENS, max_new_tokens=2, pad_token_id=0)
    model.fate.close()


def test_budgets_change_no_bit_of_a_gradient(loaded: Callable[..., Any]) -> None:
    want, *others = [gradients(adapted(loaded("qwen2_moe", expert_cache=size), LORA())) for size in ("100%", "60%", "15%")]
    assert all(torch.equal(other[name], want[name]) for other in others for name in want)


def test_shorter_views_give_the_gradients_of_what_was_computed(quantized: tuple[Path, Path], small_counts: None) -> None:
    """Experts of 2 bits in forward are of 2 bits in backward, although these are whole by then."""
    from tests.layers.test_modules import Fixed

    model = load_model(quantized[1], expert_cache="30%")
    runtime, forward, backward = model.fate.runtime, dict[Any, Any](), dict[Any, Any]()
    runtime.view_selector.policy = Fixed(2)
    run, back = runtime._slots.run, runtime._slots.gradients

    def running(layer: int, *args: Any) -> None:
        forward.update({(layer, expert): planes for expert, planes in args[-1].items()})
        run(layer, *args)

    def going_back(layer: int, experts: Any, expert: int, *args: Any) -> Any:
        backward[layer, expert] = args[-1]
        return back(layer, experts, expert, *args)

    runtime._slots.run, runtime._slots.gradients = running, going_back
    gradients(adapted(model, LORA()))
    assert backward == forward
    assert 1 in forward.values()
    model.fate.close()


def test_what_cannot_be_trained_is_refused_at_once(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(UnsupportedCallError, match=EXPERTS):
        model.requires_grad_(True)
    with pytest.raises(UnsupportedCallError, match=EXPERTS):
        experts.down_proj.requires_grad = True
    assert model.requires_grad_(False) is model
    with pytest.raises(UnsupportedCallError, match=f"{EXPERTS}|cannot be copied"):
        adapted(model, LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["experts"]))


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize(
    "target", [{"target_parameters": ["experts.gate_up_proj"], "target_modules": []}, {"target_modules": ["experts"]}]
)
def test_adapters_on_experts_are_refused(loaded: Callable[..., Any], family: str, target: dict[str, Any]) -> None:
    """Never an adapter without effect."""
    from peft import get_peft_model

    model = loaded(family)
    with pytest.raises((UnsupportedCallError, ValueError), match=rf"{EXPERTS}|Experts[\s\S]* is not supported"):
        get_peft_model(model, LoraConfig(r=2, **target))(TOKENS)


@pytest.mark.parametrize("what", ["merge_adapter", "merge_and_unload", "pissa", "modules_to_save"])
def test_edits_of_quantized_weights_are_refused(quantized: tuple[Path, Path], small_counts: None, what: str) -> None:
    model = load_model(quantized[1])
    config = LORA(
        init_lora_weights="pissa" if what == "pissa" else True, modules_to_save=["lm_head"] if what == "modules_to_save" else None
    )
    with pytest.raises(UnsupportedCallError, match=QUANTIZED):
        getattr(adapted(model, config), what)()
    model.fate.close()


def test_second_derivatives_are_refused(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    embeds = torch.randn(1, 3, 64, requires_grad=True)
    with pytest.raises(UnsupportedCallError, match="leave create_graph=True out"):
        torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds, create_graph=True)


def test_transforms_are_refused(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    embeds = torch.randn(2, 3, 64)

    def score(one: torch.Tensor) -> Any:
        return model(inputs_embeds=one[None]).logits.sum()

    def dual() -> None:
        with forward_ad.dual_level():
            model(inputs_embeds=forward_ad.make_dual(embeds, embeds))  # type: ignore[no-untyped-call]

    for transformed in (
        lambda: torch.func.grad(score)(embeds[0]),
        lambda: vmap(score)(embeds),
        lambda: vmap(lambda one: model(one[None]).logits.sum())(TOKENS),
        lambda: jvp(score, (embeds[0],), (embeds[0],)),
        lambda: torch.autograd.functional.jacobian(score, embeds[0], vectorize=True),  # type: ignore[no-untyped-call]
        dual,
    ):
        with pytest.raises(UnsupportedCallError, match=r"torch\.func, vmap and forward-mode differentiation"):
            transformed()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_backward_after_closing_is_refused(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    loss = adapted(model, LORA())(TOKENS, labels=TOKENS).loss
    model.fate.close()
    with pytest.raises(Exception, match="closed; load it again"):
        loss.backward()


def test_backward_after_a_pass_that_was_cut_short(loaded: Callable[..., Any]) -> None:
    """The slots that it had taken are given back: at this budget there are no others."""
    model = loaded("qwen2_moe", expert_cache="15%")
    trained = adapted(model, LORA())
    loss = trained(TOKENS, labels=TOKENS).loss

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.gate.register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        trained(TOKENS)
    handle.remove()
    loss.backward()
    assert len(collected(trained)) == 8
