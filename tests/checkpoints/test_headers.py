"""Quantized tensors that do not fit together are refused from headers, before a byte of them is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fate_moe.checkpoints.source import Checkpoint
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.io.tensorfile import read_header

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
CODES = torch.zeros(32, 32).to(torch.float8_e4m3fn)
WORDS = torch.zeros(8, 64, dtype=torch.int32)  # gptq: [64 in / 8, 64 out]; two groups of 32
SCALES, ZEROS = torch.ones(2, 64, dtype=torch.float16), torch.zeros(2, 8, dtype=torch.int32)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None = None) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization} if quantization else {}))
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("tensors", "quantization", "message"),
    [
        ({"a.weight_scale_inv": torch.ones(2, 2)}, FP8, r"a\.weight_scale_inv \(F32\) is quantized"),
        ({"a.weight": torch.ones(32, 32), "a.weight_scale_inv": torch.ones(2, 2)}, FP8, r"weight_scale_inv \(F32\) is quantized"),
        ({"a.weight": CODES, "a.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, FP8, r"weight_scale_inv \(I32\)"),
        ({"a.weight": CODES, "a.weight_scale_inv": torch.ones(2, 3)}, FP8, r"a\.weight_scale_inv: scales of shape \(2, 3\)"),
        ({"a.weight": CODES, "a.weight_scale_inv": torch.ones(2, 2)}, None, r"blocks of \(128, 128\) need \(1, 1\)"),
        ({"a.weight": CODES[0], "a.weight_scale_inv": torch.ones(2)}, FP8, "block-scaled weights of shape"),
        ({"a.weight": CODES.to(torch.float8_e5m2)}, FP8, r"a\.weight \(F8_E5M2\) is quantized"),
        ({"a.weight": torch.zeros(4, dtype=torch.complex64)}, None, r"a\.weight \(C64\) is quantized"),
        ({"a.weight": torch.zeros(4, dtype=torch.int8)}, None, r"a\.weight \(I8\) is quantized"),
        ({"a_blocks": torch.zeros(2, 3, 4, dtype=torch.uint8), "a_scales": torch.zeros(2, 3, dtype=torch.uint8)}, None, "a_blocks"),
        ({"a.qweight": WORDS, "a.scales": SCALES}, GPTQ, "a.weight: it has no qzeros"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS}, GPTQ, "it has no scales"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": SCALES[:1]}, GPTQ, r"qzeros has shape \(2, 8\)"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": SCALES}, GPTQ | {"group_size": 16}, "2 groups .* group_size 16"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": SCALES}, AWQ, r"scales has shape \(2, 64\)"),
        ({"a.qweight": WORDS.long(), "a.qzeros": ZEROS, "a.scales": SCALES}, GPTQ, "qweight is I64"),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": SCALES.int()}, GPTQ, "scales is I32"),
        (
            {"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": SCALES, "a.g_idx": torch.zeros(3, dtype=torch.int32)},
            GPTQ,
            r"g_idx has shape \(3,\)",
        ),
        ({"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": SCALES}, None, r"a\.qweight \(I32\).* quantized"),
    ],
)
def test_quantized_tensors_that_do_not_fit_together(
    tmp_path: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint(tmp_path, tensors, quantization)
    assert "\n" not in str(caught.value)


def test_gptq_that_fits_is_read(tmp_path: Path) -> None:
    """Without this, the refusals above would prove nothing."""
    found = checkpoint(tmp_path, {"a.qweight": WORDS, "a.qzeros": ZEROS, "a.scales": SCALES}, GPTQ)
    assert found.shape("a.weight") == (64, 64)


@pytest.mark.parametrize("quantization", [[4], {"bits": 4}, {"quant_method": "awq", "bits": 4, "version": 3}])
def test_quantization_configs_that_say_nothing_known(tmp_path: Path, quantization: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        checkpoint(tmp_path, {"a.weight": torch.ones(2)}, quantization)


def test_many_tensors_of_an_unknown_kind_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a \(F8_E5M2\), b \(F8_E5M2\), .* \.\.\. \(4 in all\) are quantized"):
        checkpoint(tmp_path, {name: torch.zeros(1).to(torch.float8_e5m2) for name in "abcd"})


def test_a_name_that_stands_twice_in_a_header(tmp_path: Path) -> None:
    """With one place and two shapes: json would take the last."""
    one = '"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,16]}'
    text = ("{" + one % "4" + "," + one % "2,2" + "}").encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match="a name stands twice"):
        read_header(tmp_path / "x")
