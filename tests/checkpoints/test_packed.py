"""GPTQ, AWQ and compressed-tensors: packed by a plain-Python writer, dequantized by definition, codes preserved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fate_moe.checkpoints.source import Checkpoint
from fate_moe.core import ExpertId
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.kernels.reference import expert_weights
from fate_moe.quant.blob import QuantizedMatrix, exact_codes, views
from fate_moe.store.convert import convert
from fate_moe.store.format import blob_layout
from fate_moe.store.open import load_dense, open_store
from fate_moe.store.reader import DiskSource
from tests.support.reading import load_all

pytestmark = pytest.mark.slow

AWQ_COLUMN = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this one of its eight columns


def words(codes: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """I32 words [R, C * bits / 32] of codes [R, C], one Python integer at a time."""
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        packed = []
        for start in range(0, len(row), per_word):
            word = sum(row[start + (order[i] if order else i)] << bits * i for i in range(per_word))
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


class Quantized:
    """One matrix as codes in groups of 16, and its dequantized weights."""

    def __init__(self, shape: tuple[int, int], bits: int, symmetric: bool, seed: int, act_order: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, cols = shape
        groups = cols // 16
        self.bits = bits
        self.codes = torch.randint(0, 2**bits, shape, generator=generator)
        self.scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.005).half()
        middle = torch.full((rows, groups), 2 ** (bits - 1))
        self.zero = middle if symmetric else torch.randint(1, 2**bits, (rows, groups), generator=generator)
        self.group_of = torch.arange(cols) // 16
        if act_order:
            self.group_of = self.group_of[torch.randperm(cols, generator=generator)]

    def weight(self) -> torch.Tensor:
        """Element by element."""
        out = torch.empty(self.codes.shape)
        for r in range(out.shape[0]):
            for c in range(out.shape[1]):
                g = int(self.group_of[c])
                out[r, c] = float(self.scale[r, g]) * (int(self.codes[r, c]) - int(self.zero[r, g]))
        return out

    def gptq(self, offset: int = 1) -> dict[str, torch.Tensor]:
        return {
            "qweight": words(self.codes, self.bits).T.contiguous(),
            "qzeros": words(self.zero.T - offset, self.bits),
            "scales": self.scale.T.contiguous(),
            "g_idx": self.group_of.int(),
        }

    def awq(self) -> dict[str, torch.Tensor]:
        return {
            "qweight": words(self.codes.T, 4, AWQ_COLUMN),
            "qzeros": words(self.zero.T, 4, AWQ_COLUMN),
            "scales": self.scale.T.contiguous(),
        }

    def compressed(self, symmetric: bool) -> dict[str, torch.Tensor]:
        parts = {
            "weight_packed": words(self.codes, self.bits),
            "weight_scale": self.scale.clone(),
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(self.zero.T, self.bits).T.contiguous()
        return parts


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"},
    "gptq8": {"quant_method": "gptq", "bits": 8, "group_size": 16},
    "act-order": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16, "strategy": "group", "symmetric": True}}},
    },
}
CONFIGS["compressed-asymmetric"] = CONFIGS["compressed"]


def packed_checkpoint(plain: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint's projections in the format ``kind``; returns the dequantized tensors by their plain names."""
    meaning, written = {}, {}
    for seed, (name, tensor) in enumerate(load_all(plain).items()):
        if not name.endswith("_proj.weight"):
            meaning[name] = written[name] = tensor
            continue
        symmetric = kind == "compressed"
        matrix = Quantized(tuple(tensor.shape), 8 if kind == "gptq8" else 4, symmetric, seed, kind == "act-order")  # type: ignore[arg-type]
        parts = (
            matrix.awq()
            if kind == "awq"
            else matrix.compressed(symmetric)
            if kind.startswith("compressed")
            else matrix.gptq(0 if kind == "gptq_v2" else 1)
        )
        written |= {f"{name.removesuffix('weight')}{leaf}": part for leaf, part in parts.items()}
        meaning[name] = matrix.weight()
    folder.mkdir()
    save_file(written, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": CONFIGS[kind]}
    (folder / "config.json").write_text(json.dumps(config))
    return meaning


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_format_dequantizes_to_its_definition(checkpoint: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    meaning = packed_checkpoint(checkpoint("qwen2_moe"), tmp_path / "packed", kind)
    source = Checkpoint(tmp_path / "packed")
    assert set(source.names) == set(meaning)
    for name, tensor in meaning.items():
        got = source.read(name)
        assert source.shape(name) == tuple(got.shape)
        assert source.dtype(name) == got.dtype
        assert torch.equal(got, tensor.to(got.dtype)), name
    store = open_store(convert(tmp_path / "packed", tmp_path / "store"))
    for name, tensor in load_dense(store).items():
        assert torch.equal(tensor, meaning[name].to(source.dtype(name)).to(tensor.dtype)), name


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed"])
def test_int4_preserves_the_codes(checkpoint: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """Weights whose groups match the store's equal the checkpoint's, except for rounding scale * zero to fp16."""
    meaning = packed_checkpoint(checkpoint("qwen2_moe"), tmp_path / "packed", kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fate_moe.store.convert.GROUP_SIZES", (16,))
        store = open_store(convert(tmp_path / "packed", tmp_path / "store", "int4", group_size=16))
    source = DiskSource(store)
    layout = store.manifest.layouts_of(0)[0]
    memory = torch.empty(layout.length + 4096, dtype=torch.uint8)
    start = -memory.data_ptr() % 4096
    memory = memory[start : start + layout.length]
    source.read(ExpertId(0, 3), memory.numpy().data)
    got = expert_weights(layout, views(layout, memory), {"gate_up_proj": (64, 64), "down_proj": (64, 32)}, torch.float32)
    at = "model.layers.0.mlp.experts.3"
    expected = {
        "gate_up_proj": torch.cat([meaning[f"{at}.gate_proj.weight"], meaning[f"{at}.up_proj.weight"]]),
        "down_proj": meaning[f"{at}.down_proj.weight"],
    }
    for name, tensor in expected.items():
        if kind == "compressed":  # symmetric: scale * 8 is exact
            assert torch.equal(got[name], tensor)
        bound = 16 * 0.025 * 2**-11  # scale * zero is below 0.4, and fp16 rounds by at most 2**-11 of it
        assert (got[name] - tensor).abs().max() <= bound
    source.close()


def test_codes_that_a_layout_cannot_hold_are_solved_again() -> None:
    layout = blob_layout("int4", {"down_proj": (4, 128)}, "F32", group_size=64)
    codes = torch.randint(0, 16, (4, 128), dtype=torch.uint8)
    scale = torch.full((4, 128), 0.5)
    zero = torch.full((4, 128), 8.0)
    exact = exact_codes(layout, QuantizedMatrix(codes, scale, zero))
    assert exact is not None
    assert torch.equal(exact[0], codes)
    assert exact[1].tolist() == [[0.5] * 2] * 4
    assert exact[2].tolist() == [[4.0] * 2] * 4
    several = scale.clone()
    several[:, 32:64] = 0.25
    assert exact_codes(layout, QuantizedMatrix(codes, several, zero)) is None, "two scales in a group"
    assert exact_codes(layout, QuantizedMatrix(codes + 16, scale, zero)) is None, "more bits"
    assert exact_codes(layout, QuantizedMatrix(codes, scale + 1e-5, zero)) is None, "a scale that fp16 cannot represent"
    assert exact_codes(layout, QuantizedMatrix(codes, scale * 1e5, zero)) is None, "beyond fp16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "gptq with 3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ],
)
def test_other_variants_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(checkpoint("qwen2_moe"), tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS["gptq"] | change}))
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint(tmp_path / "odd")


def test_parts_that_do_not_fit_are_an_error(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    packed_checkpoint(checkpoint("qwen2_moe"), tmp_path / "packed", "gptq")
    tensors = load_all(tmp_path / "packed")
    name = next(name for name in tensors if name.endswith("scales"))
    tensors[name] = tensors[name][:, :-8].contiguous()
    save_file(tensors, tmp_path / "packed/model.safetensors")
    with pytest.raises(CheckpointError, match="scales has shape"):
        Checkpoint(tmp_path / "packed").read(name.replace("scales", "weight"))
