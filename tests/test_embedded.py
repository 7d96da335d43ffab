"""The embedded model: its format, its README, and what block-scaled FP8 costs it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fate_moe import demo, load

# The bf16 original on tests/data/heldout-books.txt, in windows of 256 tokens, by transformers 5.23 (nats per token).
ORIGINAL_LOSS = 3.3505
README = (demo.MODEL / "README.md").read_text()
PROJECT = Path(__file__).parents[1]


def in_readme(pattern: str) -> list[float]:
    """The numbers that the README gives where ``pattern`` matches, which it has to."""
    found = re.search(pattern, README)
    assert found is not None, f"the README does not say {pattern}"
    return [float(number.replace(",", "")) for number in found.groups()]


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


@pytest.mark.slow
def test_fp8_costs_less_than_half_a_percent() -> None:
    loss = held_out_loss("lossless")
    assert loss == pytest.approx(ORIGINAL_LOSS, rel=0.005)
    assert in_readme(r"heldout-books.txt`, windows of 256, both in fp32: bf16 (\d+\.\d+), FP8 (\d+\.\d+)") == [
        ORIGINAL_LOSS,
        pytest.approx(loss, abs=0.002),
    ]


@pytest.mark.slow
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


def test_its_readme_describes_it() -> None:
    """The numbers are those of the files beside it, and what it refers to is there."""
    config = json.loads((demo.MODEL / "config.json").read_text())
    assert in_readme(r"(\d+) layers, \*\*(\d+) routed experts, top-(\d+)") == [
        config[name] for name in ("num_hidden_layers", "num_experts", "num_experts_per_tok")
    ]
    assert in_readme(r"hidden (\d+), expert width (\d+), shared (\d+), (\d+) heads of (\d+) over (\d+) KV heads") == [
        *(config[name] for name in ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size")),
        config["num_attention_heads"],
        config["hidden_size"] // config["num_attention_heads"],
        config["num_key_value_heads"],
    ]
    assert in_readme(r"BPE of ([\d,]+) tokens") == [config["vocab_size"]]
    shards, parameters = sorted(demo.MODEL.glob("*.safetensors")), 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        parameters += sum(size for name, size in sizes.items() if not name.endswith("_scale_inv"))
    assert in_readme(r"([\d.]+) M parameters") == [round(parameters / 1e6, 1)]
    assert in_readme(r"([\d.]+) MB in four shards") == [round(sum(shard.stat().st_size for shard in shards) / 1e6, 1)]
    assert len(shards) == 4
    named = re.findall(r"\b(?:recipes|docs|tests)/[\w./-]+\w", README)
    assert len(named) >= 4
    assert [name for name in named if not (PROJECT / name).exists()] == []
