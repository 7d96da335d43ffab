"""The FP8 export: its format, its error bound, and the conversion of its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import export_fp8

from fate_moe.core import ExpertId
from fate_moe.store.convert import convert
from fate_moe.store.open import load_dense, open_store, verify
from fate_moe.store.reader import DiskSource
from tests.store.test_convert import read_parts
from tests.support.checkpoints import tiny_checkpoint
from tests.support.reading import load_all, published_expert, same_bits

LAYER = "model.layers.1."
QUANTIZED = {f"{LAYER}self_attn.{name}_proj.weight" for name in "qkvo"} | {
    f"{LAYER}mlp.{expert}.{name}_proj.weight" for expert in ("experts.5", "shared_expert") for name in ("gate", "up", "down")
}
UNQUANTIZED = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    f"{LAYER}input_layernorm.weight",
    f"{LAYER}mlp.gate.weight",
    f"{LAYER}mlp.shared_expert_gate.weight",
    f"{LAYER}self_attn.q_proj.bias",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 160 x 144: blocks with ragged edges in both directions."""
    folder = tmp_path_factory.mktemp("bf16") / "model"
    sizes: dict[str, Any] = {"hidden_size": 144, "moe_intermediate_size": 160, "shared_expert_intermediate_size": 136}
    tiny_checkpoint("qwen2_moe", folder, torch.bfloat16, **sizes)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("# A model\n")
    (folder / "training.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    return export_fp8.export(model, model.parent / "fp8")


def plain(code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 of a matrix, block by block."""
    out = torch.empty(code.shape)
    for r in range(0, code.shape[0], 128):
        for c in range(0, code.shape[1], 128):
            out[r : r + 128, c : c + 128] = code[r : r + 128, c : c + 128].float() * scale[r // 128, c // 128]
    return out


def test_the_format(model: Path, exported: Path) -> None:
    before, after = load_all(model), load_all(exported)
    scaled = {name for name in after if name + "_scale_inv" in after}
    assert after.keys() - before.keys() == {name + "_scale_inv" for name in scaled}
    assert scaled >= QUANTIZED
    assert scaled.isdisjoint(UNQUANTIZED)
    assert before.keys() >= UNQUANTIZED
    for name, tensor in before.items():
        if name not in scaled:
            assert same_bits(after[name], tensor)
            continue
        scale = after[name + "_scale_inv"]
        assert after[name].dtype == torch.float8_e4m3fn
        assert after[name].shape == tensor.shape
        assert scale.dtype == torch.float32
        assert scale.shape == (-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128))
    assert after[f"{LAYER}mlp.experts.5.up_proj.weight_scale_inv"].shape == (2, 2)
    config = json.loads((exported / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    assert config == json.loads((model / "config.json").read_text())


def test_files_and_index(model: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_fp8, "SHARD_BYTES", 300_000)
    out = export_fp8.export(model, tmp_path / "fp8")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 3
    assert all((out / shard).stat().st_size <= 300_000 for shard in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for shard in shards:
        with safe_open(out / shard, "pt") as file:
            held |= dict.fromkeys(file.keys(), shard)
    assert index["weight_map"] == held
    many, few = load_all(out), load_all(exported)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    assert many.keys() == few.keys()
    assert all(same_bits(many[name], few[name]) for name in many)
    others = {path.name for path in out.iterdir()} - set(shards)
    expected = {"config.json", "generation_config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"}
    assert others == expected, "training.json is not copied"
    for name in ("tokenizer.json", "README.md", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(-30, 30), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_round_trip_is_within_e4m3s_half_step(rows: int, cols: int, exponent: int, seed: int) -> None:
    """Half a unit in the last of three bits of mantissa, or half the smallest subnormal (2**-9) of a block's scale."""
    weight = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).bfloat16()
    weight[: rows // 3] = 0
    code, scale = export_fp8.quantize(weight)
    error = (plain(code, scale) - weight.float()).abs()
    bound = torch.maximum(weight.float().abs() * 2**-4, plain(torch.full_like(weight, 2**-10), scale))
    assert (error <= bound * 1.0001).all()  # the product and the quotient round too, in fp32
    for r in range(0, rows, 128):
        for c in range(0, cols, 128):
            block = code[r : r + 128, c : c + 128].float()
            assert block.abs().max() in (0, 448), "each block uses e4m3's full range"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["lossless", "int4"])
def test_a_conversion_reads_it(model: Path, exported: Path, tmp_path: Path, precision: str) -> None:
    """The store of the export is the store of its plain dequantization to bf16."""
    after = load_all(exported)
    written = {name: tensor for name, tensor in after.items() if not name.endswith("_scale_inv")}
    for name in written:
        if name + "_scale_inv" in after:
            written[name] = plain(written[name], after[name + "_scale_inv"]).bfloat16()
    (tmp_path / "plain").mkdir()
    save_file(written, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "config.json").write_bytes((model / "config.json").read_bytes())
    ours, theirs = (convert(folder, tmp_path / f"{folder.name}-store", precision) for folder in (exported, tmp_path / "plain"))
    verify(open_store(ours))
    for path in theirs.glob("*.safetensors"):
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name
    assert all(torch.equal(tensor, written[name]) for name, tensor in load_dense(open_store(ours)).items())
    if precision == "lossless":
        source = DiskSource(open_store(ours))
        parts = read_parts(source, ExpertId(1, 5))
        source.close()
        assert all(same_bits(parts[name], tensor) for name, tensor in published_expert(written, "qwen2_moe", 1, 5).items())


def test_bad_input_is_one_line_and_leaves_nothing(
    model: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    stacked = tiny_checkpoint("gpt_oss", tmp_path / "stacked", torch.bfloat16)
    infinite = tmp_path / "infinite"
    infinite.mkdir()
    tensors = load_all(model)
    tensors[f"{LAYER}mlp.experts.5.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, infinite / "model.safetensors")
    (infinite / "config.json").write_bytes((model / "config.json").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (tmp_path / "nowhere", tmp_path / "out", "not a folder"),
        (tmp_path / "empty", tmp_path / "out", "neither model.safetensors nor"),
        (exported, tmp_path / "out", "already quantized"),
        (stacked, tmp_path / "out", "has 3 dimensions"),
        (infinite, tmp_path / "out", "experts.5.up_proj.weight has infinite or NaN weights"),
        (model, tmp_path / "full", "exists"),
        (model, tmp_path / "full" / "mine", "exists"),
    ]
    for source, out, message in cases:
        capsys.readouterr()  # save_pretrained's progress bars
        assert export_fp8.main(["--model", str(source), "--out", str(out)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("export_fp8: ")
        assert message in line
        assert sorted(tmp_path.rglob("*")) == before


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_fp8.main(["--model", str(model), "--out", str(tmp_path / "a" / "fp8")]) == 0
    assert "MB in 1 shards" in capsys.readouterr().out
    assert (tmp_path / "a" / "fp8" / "model-00001-of-00001.safetensors").stat().st_mode & 0o777 == 0o644
