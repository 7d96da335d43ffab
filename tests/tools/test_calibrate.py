"""Calibration against statistics of transformers' own forward pass, and its effect on quantized codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fate_moe import demo
from fate_moe.cli import main
from fate_moe.engine.prepare import load_tokenizer, store_for
from fate_moe.store.convert import convert
from fate_moe.store.learned import load_view_losses
from fate_moe.store.open import open_store
from fate_moe.tools import calibrate as module
from fate_moe.tools.calibrate import calibrate, measure_errors, measure_view_losses
from tests.support.checkpoints import tiny_checkpoint, tiny_model
from tests.support.engines import load_model

pytestmark = pytest.mark.slow

BOOKS = Path(__file__).parents[1] / "data/heldout-books.txt"
TOKENS = torch.randint(1, 128, (60,), generator=torch.Generator().manual_seed(0))


def test_moments_are_those_of_the_experts_inputs(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the layer's other tokens: sums over the expert's own, by squared routing weight."""
    monkeypatch.setattr(module, "OTHER_TOKENS_WEIGHT", 0.0)
    calibration = calibrate(store_for(checkpoint("qwen2_moe"), "lossless"), TOKENS, window=60)
    model = tiny_model("qwen2_moe")
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        experts.register_forward_pre_hook(lambda module, args, layer=layer: seen.update({layer: args}))
    with torch.no_grad():
        model(TOKENS[None])
    for layer, (hidden, index, routing_weights) in seen.items():
        experts = model.model.layers[layer].mlp.experts
        for expert in range(8):
            token, choice = (index == expert).nonzero(as_tuple=True)
            weights = {name: getattr(experts, name)[expert].detach() for name in ("gate_up_proj", "down_proj")}
            moments = calibration.moments(layer, expert, weights)
            mass = routing_weights[token, choice].square()[:, None]
            inner = experts._apply_gate(hidden[token] @ weights["gate_up_proj"].T)
            for name, x in (("gate_up_proj", hidden[token]), ("down_proj", inner)):
                assert torch.allclose(moments[name], x.T @ (x * mass), rtol=1e-3, atol=1e-6)


def test_experts_without_tokens_use_their_layers_moments(checkpoint: Callable[[str], Path]) -> None:
    calibration = calibrate(store_for(checkpoint("qwen2_moe"), "lossless"), TOKENS[:3], window=3)
    unseen = next(expert for expert in range(8) if not (calibration.inputs[0].chosen == expert).any())
    experts = tiny_model("qwen2_moe").model.layers[0].mlp.experts
    weights = {name: getattr(experts, name)[unseen].detach() for name in ("gate_up_proj", "down_proj")}
    moments = calibration.moments(0, unseen, weights)
    assert {name: tuple(tensor.shape) for name, tensor in moments.items()} == {"gate_up_proj": (64, 64), "down_proj": (32, 32)}
    hidden = calibration.inputs[0].hidden
    expected = hidden.T @ hidden
    assert torch.allclose(moments["gate_up_proj"] / moments["gate_up_proj"].norm(), expected / expected.norm(), atol=1e-4)


def test_errors_are_those_of_the_layers_output(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plain codes, without moments."""
    lossless = store_for(checkpoint("qwen2_moe"), "lossless")
    calibration = calibrate(lossless, TOKENS, window=60)
    monkeypatch.setattr(calibration, "moments", lambda layer, expert, tensors: None)
    errors = measure_errors(lossless, calibration, ("int4", "lossless"))
    assert [layer["lossless"] for layer in errors] == [0.0, 0.0]
    outputs = {}
    for precision in ("lossless", "int4"):
        model = load_model(store_for(checkpoint("qwen2_moe"), precision), exact_activations=True)
        block = model.model.layers[0].mlp.experts
        block.register_forward_hook(lambda module, args, out, precision=precision: outputs.update({precision: out}))
        model.model.layers[0].register_forward_pre_hook(lambda module, args: outputs.update(stream=args[0]))
        with torch.no_grad():
            model(TOKENS[None])
        model.fate.close()
    expected = (outputs["int4"] - outputs["lossless"]).square().sum() / outputs["stream"].square().sum()
    assert errors[0]["int4"] == pytest.approx(float(expected), rel=1e-3)


def test_calibrated_codes_have_a_smaller_error_on_the_texts_inputs(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The text is also part of the store's identity."""
    lossless = store_for(checkpoint("qwen2_moe"), "lossless")
    tokens = TOKENS.repeat(4)
    calibration = calibrate(lossless, tokens, window=60)
    paths = [
        convert(checkpoint("qwen2_moe"), tmp_path / name, "int4", calibration=moments)
        for name, moments in (("plain", None), ("calibrated", calibration))
    ]
    assert open_store(paths[0]).manifest.identity != open_store(paths[1]).manifest.identity
    outputs = []
    for path in (lossless, *paths):
        model = load_model(path)
        block = model.model.layers[0].mlp.experts
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
        with torch.no_grad():
            model(TOKENS[None])
        model.fate.close()
    exact, plain, calibrated = outputs
    assert (calibrated - exact).norm() < 0.9 * (plain - exact).norm()


def test_view_losses(checkpoint: Callable[[str], Path]) -> None:
    """The difference of the losses with a shorter view and with all bits; a lossless store has no views."""
    assert measure_view_losses(store_for(checkpoint("qwen2_moe"), "lossless"), TOKENS) == {}
    path = store_for(None, "int4")
    tokens = load_tokenizer(path)(BOOKS.read_text()[:1000], return_tensors="pt")["input_ids"][0]
    losses = measure_view_losses(path, tokens)
    assert list(losses) == [2, 3]
    assert 0.05 < losses[2] < 1.0
    assert -0.05 < losses[3] < losses[2] / 2


@pytest.mark.slow
def test_calibrate_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The store records the losses of its views, and policies choose by them."""
    monkeypatch.setattr("fate_moe.quant.compensate.DESCENTS", 0)  # which take most of the time
    options = ["--calibrate", str(BOOKS), "--calibrate-tokens", "256", "--solver", "minmax"]
    assert main(["convert", str(demo.MODEL), str(tmp_path / "store"), "--precision", "int4", *options]) == 0
    assert "2-bit view: +" in capsys.readouterr().out
    losses = load_view_losses(tmp_path / "store")
    assert losses is not None
    model = load_model(tmp_path / "store", precision_policy="prefill-popularity")
    assert model.fate.runtime.view_selector.policy._losses == losses
    model.fate.close()


@pytest.mark.parametrize(("num_tokens", "text"), [("-5", "much"), ("0", "much"), ("100", "too short")])
def test_too_few_tokens_to_calibrate_with(num_tokens: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text(text)
    options = ["--calibrate", str(tmp_path / "short.txt"), "--calibrate-tokens", num_tokens]
    assert main(["convert", str(demo.MODEL), str(tmp_path / "store"), "--precision", "int4", *options]) == 1
    assert "at least 16" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_auto_bits_needs_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "anything", str(tmp_path / "store"), "--auto-bits", "20MiB"]) == 1
    assert "--calibrate" in capsys.readouterr().err


def test_auto_bits_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts fit the size, and the remainder upgrades some layers but not all."""
    monkeypatch.setattr("fate_moe.quant.compensate.DESCENTS", 0)  # which take most of the time
    source = tiny_checkpoint("qwen2_moe", tmp_path / "source", vocab_size=8192, num_hidden_layers=4)
    for file in demo.MODEL.glob("tokenizer*.json"):
        shutil.copy(file, source)
    least, most = (
        open_store(convert(source, tmp_path / precision, precision, solver="minmax")).manifest.expert_bytes
        for precision in ("int4", "int8")
    )
    limit = (least + most) // 2
    options = ["--auto-bits", str(limit), "--calibrate", str(BOOKS), "--calibrate-tokens", "64", "--solver", "minmax"]
    assert main(["convert", str(source), str(tmp_path / "store"), "--precision", "int4", *options]) == 0
    manifest = open_store(tmp_path / "store").manifest
    assert limit - (most - least) // 4 < manifest.expert_bytes <= limit, "one of four layers more would not fit"
    assert len(manifest.layers_by_precision()) > 1
