"""The embedded model: its format, its README, and what block-scaled FP8 costs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fate_moe import demo, load

# The bf16 original on tests/data/heldout-books.txt, in windows of 256 tokens, by transformers 5.23 (nats per token).
ORIGINAL_LOSS = 3.3505


def held_out_loss(precision: str) -> float:
    model, tokenizer = load(None, context_length=257, precision=precision)
    try:
        tokens = torch.tensor(tokenizer((Path(__file__).parent / "data/heldout-books.txt").read_text()).input_ids)
        total = 0.0
        with torch.inference_mode():
            for start in range(0, len(tokens) - 1, 256):
                window = tokens[start : start + 257]
                logits = model(window[None, :-1]).logits[0].float()
                total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        return total / (len(tokens) - 1)
    finally:
        model.fate.close()


def test_fp8_costs_less_than_half_a_percent() -> None:
    assert held_out_loss("lossless") == pytest.approx(ORIGINAL_LOSS, rel=0.005)


def test_int4_is_usable() -> None:
    assert held_out_loss("int4") < ORIGINAL_LOSS * 1.02


def test_it_is_block_scaled_fp8_and_small() -> None:
    quantization = json.loads((demo.MODEL / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["weight_block_size"]) == ("fp8", [128, 128])
    shards = sorted(demo.MODEL.glob("*.safetensors"))
    assert sum(shard.stat().st_size for shard in shards) < 48e6
    dtypes: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    scales = {name.removesuffix("_scale_inv") for name in dtypes if name.endswith("_scale_inv")}
    assert scales == {name for name, dtype in dtypes.items() if dtype == "F8_E4M3"}
    assert sum(".mlp.experts." in name for name in scales) == 12 * 60 * 3
    assert all(dtypes[name] == "BF16" for name in dtypes if "mlp.gate." in name or "norm" in name or "embed" in name)


def test_its_readme_comes_along() -> None:
    assert "Held-out loss" in (demo.MODEL / "README.md").read_text()
