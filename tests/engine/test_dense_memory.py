"""Quantized dense weights are in memory once: what a process grows by when it loads them, and when it then runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from fate_moe.store.convert import convert

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


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_dense_weights_are_held_once(tmp_path: Path, precision: str) -> None:
    """27 M dense weights: 29 or 17 MB at rest, 54 MB as bf16, 108 MB as fp32."""
    stores = []
    for hidden in (64, 1024):
        config = AutoConfig.for_model(
            "qwen2_moe", hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=512,
            moe_intermediate_size=64, shared_expert_intermediate_size=2816, num_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / str(hidden))
        store = tmp_path / f"{hidden}-store"
        stores.append(str(convert(tmp_path / str(hidden), store, "int4", dense_precision=precision)))
    size = (Path(stores[1]) / "dense.safetensors").stat().st_size
    experts = sum(file.stat().st_size for file in Path(stores[1]).glob("experts-*"))
    done = subprocess.run([sys.executable, "-c", _CHILD, *stores], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert size > 15e6
    assert 0.8 * size < said["loaded"] < 1.25 * size + experts  # the embedding stays on disk, old pages serve again
    assert said["used"] < 1.25 * size + experts + 4e6  # activations
