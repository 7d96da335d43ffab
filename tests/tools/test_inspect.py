"""Descriptions from config.json alone, against sizes computed by hand from the published architectures."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fate_moe.cli import main
from fate_moe.engine.prepare import plan
from fate_moe.io.direct import anonymous_buffer
from fate_moe.tools.inspect import Bandwidths, describe, measure_bandwidths

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
SPEEDS = Bandwidths(memory=28e9, disk=1.2e9)


@dataclass(frozen=True)
class Hand:
    """Numbers of weights, not bytes; ``itemsize`` bytes each. ``biases`` are an expert's weights that int4 does not quantize."""

    layers: int
    experts: int
    top_k: int
    expert: int
    dense: int
    kv: int
    embedding: int
    itemsize: int = 2
    biases: int = 0


BY_HAND = {
    "Qwen3-30B-A3B": Hand(
        48, 128, 8,
        expert=3 * 2048 * 768,
        dense=2 * 151936 * 2048 + 48 * (2048 * (4096 + 2 * 512) + 4096 * 2048 + 2 * 128 + 2 * 2048 + 128 * 2048) + 2048,
        kv=48 * 2 * 4 * 128,
        embedding=151936 * 2048,
    ),
    "Mixtral-8x7B-v0.1": Hand(
        32, 8, 2,
        expert=3 * 4096 * 14336,
        dense=2 * 32000 * 4096 + 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 2 * 4096 + 8 * 4096) + 4096,
        kv=32 * 2 * 8 * 128,
        embedding=32000 * 4096,
    ),
    "OLMoE-1B-7B-0924": Hand(
        16, 64, 8,
        expert=3 * 2048 * 1024,
        dense=2 * 50304 * 2048 + 16 * (4 * 2048 * 2048 + 2 * 2048 + 2 * 2048 + 64 * 2048) + 2048,
        kv=16 * 2 * 16 * 128,
        embedding=50304 * 2048,
        itemsize=4,
    ),
    "DeepSeek-V2-Lite": Hand(
        26, 64, 6,
        expert=3 * 2048 * 1408,
        dense=2 * 102400 * 2048
        + 27 * (2048 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * 2048 + 2 * 2048)
        + 3 * 2048 * 10944
        + 26 * (64 * 2048 + 3 * 2048 * 2816)
        + 2048,
        kv=27 * 16 * (128 + 64 + 128),
        embedding=102400 * 2048,
    ),
    "gpt-oss-20b": Hand(
        24, 32, 4,
        expert=2880 * 5760 + 5760 + 2880 * 2880 + 2880,
        dense=2 * 201088 * 2880
        + 24 * (2880 * 4096 + 4096 + 2 * (2880 * 512 + 512) + 4096 * 2880 + 2880 + 64 + 2 * 2880 + 32 * 2880 + 32)
        + 2880,
        kv=24 * 2 * 8 * 64,
        embedding=201088 * 2880,
        biases=5760 + 2880,
    ),
}  # fmt: skip


def aligned(amount: int) -> int:
    return -(-amount // 4096) * 4096


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_sizes_of_published_models(name: str) -> None:
    hand, description = BY_HAND[name], describe(CONFIGS / name, SPEEDS)
    assert (description.layers, description.experts, description.top_k) == (hand.layers, hand.experts, hand.top_k)
    assert description.dense_bytes == description.precisions["lossless"].dense_bytes == hand.dense * hand.itemsize
    assert description.kv_bytes_per_token == hand.kv * hand.itemsize
    int4 = (hand.expert - hand.biases) * 36 // 64 + hand.biases * hand.itemsize  # 4 bits and two fp16 for each 64 weights
    for precision, expert in (("lossless", hand.expert * hand.itemsize), ("int4", int4)):
        estimate = description.precisions[precision]
        assert 0 <= estimate.expert_bytes - aligned(expert) <= 4096  # parts begin at multiples of 64
        assert estimate.store_bytes == estimate.dense_bytes + hand.layers * hand.experts * estimate.expert_bytes
        made = plan(CONFIGS / name, ram="200GiB", precision=precision, context_length=1000)
        assert (made.slot_bytes, made.num_experts) == (estimate.expert_bytes, hand.layers * hand.experts)
        assert made.kv_cache_bytes == 1024 * description.kv_bytes_per_token  # whole blocks
        embedding = hand.embedding * (hand.itemsize if precision == "lossless" else 1.0625)  # int8: two fp16 for each 64 weights
        assert 0 <= estimate.dense_bytes - made.dense_bytes - embedding <= 4096  # read by row: not resident
        assert made.num_slots == made.num_experts


def test_speeds_are_bounded_by_disk_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_moe.tools.inspect.available_memory", lambda: 16 << 30)
    int4 = describe(CONFIGS / "Qwen3-30B-A3B", SPEEDS).precisions["int4"]
    assert int4.tokens_per_second is not None
    low, high = int4.tokens_per_second
    per_token = 48 * 8 * int4.expert_bytes
    dense = plan(CONFIGS / "Qwen3-30B-A3B", ram="200GiB", precision="int4").dense_bytes  # the dense bytes that a token reads
    assert low == pytest.approx(1 / (per_token / 1.2e9 + (dense + per_token) / 28e9))
    assert low < high < 28e9 / (dense + per_token)
    monkeypatch.setattr("fate_moe.tools.inspect.available_memory", lambda: 2 << 30)
    assert describe(CONFIGS / "Qwen3-30B-A3B", SPEEDS).precisions["int4"].tokens_per_second is None


def direct_reads_work(path: Path) -> bool:
    """Some file systems refuse O_DIRECT, when opening or when reading."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(file, [anonymous_buffer(4096)], 0) == 4096
        finally:
            os.close(file)
    except OSError:
        return False


def test_bandwidths_are_measured(tmp_path: Path) -> None:
    assert measure_bandwidths(tmp_path).disk is None
    save_file({"x": torch.zeros(5 << 20, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    speeds = measure_bandwidths(tmp_path)
    assert speeds.memory > 1e8
    assert speeds.disk is None or speeds.disk > 1e6  # O_DIRECT may not be supported here


def test_inspect_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(CONFIGS / "OLMoE-1B-7B-0924")
    assert main(["inspect", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "olmoe"
    assert facts["precisions"]["lossless"]["expert_bytes"] == 25165824
    assert main(["inspect", folder]) == 0
    assert "of which a token takes 8" in capsys.readouterr().out
    assert main(["inspect", folder, "--verify"]) == 1
    assert "convert it first" in capsys.readouterr().err
