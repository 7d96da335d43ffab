"""Calibration against statistics taken from transformers' own forward pass, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fate_moe.cli import main
from fate_moe.core import ExpertId
from fate_moe.models.calibrate import calibrate
from fate_moe.models.load import store_for
from fate_moe.store.convert import convert
from fate_moe.store.open import open_store
from tests.checkpoints import tiny_model
from tests.conftest import load_model

TOKENS = torch.randint(1, 128, (60,), generator=torch.Generator().manual_seed(0))


def test_squares_are_those_of_the_experts_inputs(checkpoint: Callable[[str], Path]) -> None:
    found = calibrate(store_for(checkpoint("qwen2_moe"), "lossless"), TOKENS, window=60)
    model = tiny_model("qwen2_moe")
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        experts.register_forward_pre_hook(lambda module, args, layer=layer: seen.update({layer: args}))
    with torch.no_grad():
        model(TOKENS[None])
    for layer, (hidden, index, gate) in seen.items():
        experts = model.model.layers[layer].mlp.experts
        for expert in range(8):
            token, choice = (index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            mass = gate[token, choice].square()
            square = (hidden[token].square() * mass[:, None]).sum(0)
            assert torch.allclose(found._squares[layer, expert]["gate_up_proj"], square, rtol=1e-4)
            inner = experts._apply_gate(hidden[token] @ experts.gate_up_proj[expert].T)
            square = (inner.square() * mass[:, None]).sum(0)
            assert torch.allclose(found._squares[layer, expert]["down_proj"], square, rtol=1e-3, atol=1e-7)


def test_experts_without_tokens_are_like_their_layer(checkpoint: Callable[[str], Path]) -> None:
    found = calibrate(store_for(checkpoint("qwen2_moe"), "lossless"), TOKENS[:3], window=3)
    seen = {key for key in found._squares if key[0] == 0}
    unseen = next(expert for expert in range(8) if (0, expert) not in seen)
    matter = found.importance(0, unseen)
    assert matter is not None
    assert {name: tuple(tensor.shape) for name, tensor in matter.items()} == {"gate_up_proj": (64,), "down_proj": (32,)}
    total = sum(found._squares[key]["gate_up_proj"] for key in seen) / sum(found._mass[key] for key in seen)
    assert torch.allclose(matter["gate_up_proj"], total)
    assert found.importance(5, 0) is None


def test_harm_is_the_error_of_the_layers_output(checkpoint: Callable[[str], Path]) -> None:
    found = calibrate(store_for(checkpoint("qwen2_moe"), "lossless"), TOKENS, precisions=("int4", "lossless"), window=60)
    assert [of_layer["lossless"] for of_layer in found.harm] == [0.0, 0.0]
    outputs = {}
    for precision in ("lossless", "int4"):
        model = load_model(store_for(checkpoint("qwen2_moe"), precision), exact_activations=True)
        block = model.model.layers[0].mlp.experts
        block.register_forward_hook(lambda module, args, out, precision=precision: outputs.update({precision: out}))
        model.model.layers[0].register_forward_pre_hook(lambda module, args: outputs.update(stream=args[0]))
        with torch.no_grad():
            model(TOKENS[None])
        model.fate.close()
    error = (outputs["int4"] - outputs["lossless"]).square().sum() / outputs["stream"].square().sum()
    assert found.harm[0]["int4"] == pytest.approx(float(error), rel=1e-3)


def test_calibrated_codes_are_nearer_on_the_texts_own_inputs(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """And the text is part of the store's identity."""
    lossless = store_for(checkpoint("qwen2_moe"), "lossless")
    tokens = TOKENS.repeat(4)
    found = calibrate(lossless, tokens, window=60)
    paths = [
        convert(checkpoint("qwen2_moe"), tmp_path / name, "int4", calibration=calibration)
        for name, calibration in (("plain", None), ("calibrated", found))
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
    assert (calibrated - exact).norm() < (plain - exact).norm()
    assert ExpertId(0, 0) in {ExpertId(*key) for key in found._squares} or len(found._squares) > 8


def test_auto_bits_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "anything", str(tmp_path / "store"), "--auto-bits", "20MiB"]) == 1
    assert "--calibrate" in capsys.readouterr().err
