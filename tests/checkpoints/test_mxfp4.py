"""MXFP4 against its definition, transformers' reader, and a complete gpt-oss checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fate_moe.checkpoints.mxfp4 import dequantize_mxfp4
from fate_moe.checkpoints.source import Checkpoint
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.store.convert import convert
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model
from tests.support.reading import load_all


def by_definition(code: int, scale: int) -> float:
    """OCP Microscaling: E2M1 without infinities, times 2 ** (scale - 127)."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
    return float((-1) ** sign * magnitude * 2.0 ** (scale - 127))


def random_parts(experts: int, out: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, out, groups, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(120, 126, (experts, out, groups), dtype=torch.uint8, generator=generator)


def test_every_code_at_its_place() -> None:
    blocks, scales = random_parts(2, 3, 2)
    made = dequantize_mxfp4(blocks, scales)
    assert made.shape == (2, 64, 3)
    for expert in range(2):
        for out in range(3):
            for column in range(64):
                byte = int(blocks[expert, out, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                assert float(made[expert, column, out]) == by_definition(code, int(scales[expert, out, column // 32]))


def test_same_as_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_parts(4, 96, 2)
    assert torch.equal(dequantize_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def published(tmp_path: Path) -> tuple[Path, Path]:
    """gpt-oss as OpenAI publishes it, and the same numbers in bf16."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
    plain = tiny_checkpoint("gpt_oss", tmp_path / "bf16", torch.bfloat16, **sizes)
    tensors, packed = load_all(plain), {}
    for number, name in enumerate([name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]):
        experts, cols, rows = tensors[name].shape
        packed[name + "_blocks"], packed[name + "_scales"] = random_parts(experts, rows, cols // 32, seed=number)
        tensors[name] = dequantize_mxfp4(packed[name + "_blocks"], packed[name + "_scales"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, plain / "model.safetensors")
    folder = tmp_path / "mxfp4"
    folder.mkdir()
    save_file(
        {name: tensor for name, tensor in tensors.items() if name + "_blocks" not in packed} | packed, folder / "model.safetensors"
    )
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, plain


def test_gpt_oss_in_mxfp4_runs_like_its_bf16(tmp_path: Path) -> None:
    folder, plain = published(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, experts_implementation="eager")
    same = load_model(convert(plain, tmp_path / "of-bf16"), expert_cache="25%")
    ours = load_model(convert(folder, tmp_path / "of-mxfp4"), expert_cache="25%")
    tokens = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, plain, expected = ours(tokens).logits, same(tokens).logits, reference(tokens).logits
    ours.fate.close()
    same.fate.close()
    assert torch.equal(got, plain)
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()  # transformers rounds to bf16 in another order


def test_blocks_without_their_scales(tmp_path: Path) -> None:
    folder, _ = published(tmp_path)
    tensors = load_all(folder)
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks"):
        Checkpoint(folder)


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    folder, _ = published(tmp_path)
    tensors = load_all(folder)
    tensors["model.layers.1.mlp.experts.down_proj_scales"] = torch.zeros(8, 64, 1, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj_blocks: scales of shape \(8, 64, 1\)"):
        Checkpoint(folder).read("model.layers.1.mlp.experts.down_proj")
