"""Quantized dense weights are in memory once: what a process grows by when it loads them, and when it then runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from fate_moe.core import BlobLayout
from fate_moe.engine.prepare import prepare
from fate_moe.store.convert import convert
from fate_moe.store.dense import dense_layouts

pytestmark = pytest.mark.slow

_CHILD = """
import json, sys
import torch
from tests.support.engines import load_model

def memory(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def grown():
    rise = memory("VmHWM") - before
    open("/proc/self/clear_refs", "w").write("5")
    return rise

small, large = sys.argv[1:]
prompt = torch.arange(1, 5)[None]  # few tokens: more are multiplied tile by tile
with torch.inference_mode():
    load_model(small)(prompt)  # brings the code in
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    model = load_model(large)
    loaded = grown()
    model(prompt)
print(json.dumps({"loaded": loaded, "used": grown()}))
"""


def stores(folder: Path, precision: str, **sizes: Any) -> list[str]:
    """A small and a large one."""
    made = []
    for hidden in (64, 1024):
        config = AutoConfig.for_model(
            "qwen2_moe", hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, **sizes,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / str(hidden))
        made.append(str(convert(folder / str(hidden), folder / f"{hidden}-store", "int4", dense_precision=precision)))
    return made


def grown(made: list[str]) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", _CHILD, *made], capture_output=True, text=True, check=True)
    said: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_dense_weights_are_held_once(tmp_path: Path, precision: str) -> None:
    """27 M dense weights: 29 or 17 MB at rest, 54 MB as bf16, 108 MB as fp32."""
    made = stores(tmp_path, precision, vocab_size=512, shared_expert_intermediate_size=2816)
    size = (Path(made[1]) / "dense.safetensors").stat().st_size
    experts = sum(file.stat().st_size for file in Path(made[1]).glob("experts-*"))
    said = grown(made)
    assert size > 15e6
    assert 0.8 * size < said["loaded"] < 1.25 * size + experts  # the embedding stays on disk, old pages serve again
    assert said["used"] < 1.25 * size + experts + 4e6  # activations


def test_a_tied_matrix_is_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """33.5 M weights, 36 MB as int8, which the store of an older version has as 67 MB of bf16."""

    def without(model: Any, precision: str) -> dict[str, BlobLayout]:
        return {name: layout for name, layout in dense_layouts(model, precision).items() if "embed" not in name}

    monkeypatch.setattr("fate_moe.store.plan.dense_layouts", without)
    made = stores(tmp_path, "int8", vocab_size=32768, shared_expert_intermediate_size=64, tie_word_embeddings=True)
    assert (Path(made[1]) / "dense.safetensors").stat().st_size > 75e6
    planned = prepare(Path(made[1])).footprint()
    said = grown(made)
    assert planned.tied_bytes > 35e6
    most = planned.dense_bytes + planned.expert_bytes + (12 << 20)
    assert 0.9 * planned.dense_bytes < said["loaded"] < most
    assert said["used"] < most
