"""Quantized dense weights: which, how near, and that offloading still changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fate_moe.engine.prepare import prepare
from fate_moe.errors import StoreError
from fate_moe.layers.dense import QuantizedLinear, quantized_weight
from fate_moe.layers.frozen import FrozenWeight
from fate_moe.quant.solver import minmax
from fate_moe.store import dense
from fate_moe.store.convert import convert
from fate_moe.store.dense import dense_layouts, encode_dense, row_read_parameter
from fate_moe.store.format import blob_layout
from fate_moe.store.open import load_dense, open_store
from tests.support.engines import load_model


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models' matrices are worth quantizing too."""
    monkeypatch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)


def a_linear(precision: str, rows: int, cols: int, exact: bool) -> tuple[QuantizedLinear, nn.Linear]:
    """A layer quantized, and one of nn.Linear with the numbers it stands for."""
    generator = torch.Generator().manual_seed(rows)
    plain = nn.Linear(cols, rows)
    plain.weight.data = torch.randn(rows, cols, generator=generator)
    layout = blob_layout(precision, {"weight": (rows, cols)}, "F32")
    blob = encode_dense(layout, plain.weight.data, minmax)
    made = QuantizedLinear(blob, layout, quantized_weight(blob, layout, (rows, cols), torch.float32), plain, exact)
    plain.weight.data = made.weight.clone()
    return made, plain


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("num_rows", [1, 8, 9, 40])
def test_a_linear_is_that_of_its_numbers(monkeypatch: pytest.MonkeyPatch, precision: str, num_rows: int) -> None:
    """Many rows go through tiles, here of a few rows each; leading dimensions are kept."""
    monkeypatch.setattr("fate_moe.layers.dense._TILE_BYTES", 2 * 130 * 16)
    made, plain = a_linear(precision, 70, 130, exact=True)
    x = torch.randn(1, num_rows, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want, true = made(x), plain(x), plain.double()(x.double())
    assert got.shape == (1, num_rows, 70)
    rounding = torch.finfo(torch.float32).eps * (x.abs() @ plain.weight.abs().float().T * 16)  # scale * code and zero nearly cancel
    assert ((got - true).abs() <= 2 * (want - true).abs().max() + rounding).all()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "gpt_oss"])
def test_default_beside_int4_experts(checkpoint: Callable[[str], Path], tmp_path: Path, small_counts: None, family: str) -> None:
    """int8 for every Linear but routers, and for the embedding; a lossless store of the same model is near."""
    plain, store = (convert(checkpoint(family), tmp_path / precision, precision) for precision in ("lossless", "int4"))
    sizes = [prepare(path).footprint().dense_bytes for path in (plain, store)]
    assert sizes[1] < sizes[0]
    model = load_model(store, expert_cache="100%", exact_activations=True)
    kinds = {type(module) for module in model.modules()}
    assert QuantizedLinear in kinds
    assert isinstance(model.get_input_embeddings().weight, FrozenWeight)
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            assert name.rpartition(".")[2] in dense._ROUTERS
    inputs = torch.tensor([[1, 5, 9, 17, 3, 2, 8, 40, 41, 42]])
    with torch.inference_mode():
        got = model(inputs).logits
    model.fate.close()
    half = load_model(convert(checkpoint(family), tmp_path / "dense", "int4", dense_precision="lossless"), expert_cache="100%")
    with torch.inference_mode():
        want = half(inputs).logits
    half.fate.close()
    assert (got - want).norm() < 0.05 * want.norm()


def test_a_weight_is_one_parameter() -> None:
    made, plain = a_linear("int8", 8, 64, exact=True)
    assert list(made.state_dict()) == list(plain.state_dict())
    assert made.load_state_dict(plain.state_dict()).missing_keys == []


def test_law_one(checkpoint: Callable[[str], Path], tmp_path: Path, small_counts: None) -> None:
    store = convert(checkpoint("qwen2_moe"), tmp_path / "store", "int8", dense_precision="int4")
    whole, half = (load_model(store, expert_cache=size) for size in ("100%", "40%"))
    options: dict[str, Any] = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    for prompt in ([[1, 5, 9]], [list(range(3, 40))]):
        answers = [model.generate(torch.tensor(prompt), **options) for model in (whole, half)]
        assert all(torch.equal(a, b) for a, b in zip(answers[0].logits, answers[1].logits, strict=True))
    for model in (whole, half):
        model.fate.close()


@pytest.mark.parametrize("precision", ["lossless", "int8"])
def test_the_embedding_is_read_by_row(
    checkpoint: Callable[[str], Path], tmp_path: Path, small_counts: None, precision: str
) -> None:
    path = convert(checkpoint("qwen2_moe"), tmp_path / "store", "int8", dense_precision=precision)
    prepared = prepare(path)
    name = "model.embed_tokens.weight"
    assert row_read_parameter(prepared.model) == name
    whole, rest = load_dense(open_store(path)), load_dense(open_store(path), exclude=name)
    assert rest.keys() == whole.keys() - {name}
    assert all(torch.equal(tensor, whole[key]) for key, tensor in rest.items())
    needs = prepared.footprint()
    assert needs.row_bytes == whole[name].nbytes
    assert needs.dense_bytes + needs.row_bytes == open_store(path).manifest.dense_bytes

    model = load_model(path, expert_cache="100%")
    embedding = model.get_input_embeddings()
    plain = load_dense(open_store(convert(checkpoint("qwen2_moe"), tmp_path / "plain")))[name]
    near = 0.0 if precision == "lossless" else float(plain.max() - plain.min()) / 255
    ids = torch.tensor([[5, 0, 5], [embedding.num_embeddings - 1, 7, 1]])
    assert embedding(ids).shape == (2, 3, embedding.embedding_dim)
    assert (embedding(ids) - plain[ids]).abs().max() <= near
    assert torch.equal(embedding(ids), embedding.weight[ids])
    with pytest.raises(IndexError, match=r"must be in 0\.\.\d+, not -1\.\.5"):
        embedding(torch.tensor([5, -1]))
    with open(path / "dense.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(StoreError, match=r"dense\.safetensors ends before byte \d+"):
        embedding(ids)
    model.fate.close()


def test_tied_and_small_matrices_stay(checkpoint: Callable[[str], Path]) -> None:
    model = prepare_meta_model(checkpoint("qwen2_moe"))
    assert dense_layouts(model, "int8") == {}, "nothing of a tiny model is large enough"
    assert dense_layouts(model, "lossless") == {}


def prepare_meta_model(folder: Path) -> nn.Module:
    from fate_moe.adapter.meta_model import build_meta_model

    model: nn.Module = build_meta_model(folder)
    return model
