"""Without the extension the same text comes from torch, and one warning says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fate_moe.engine.prepare import store_for
from fate_moe.kernels import native

pytestmark = pytest.mark.slow

# What runs in a process of its own: the extension is chosen when it is first imported.
WITHOUT = """
import json, logging, sys
import torch
from fate_moe.kernels.native import kernel_facts
from tests.support.engines import load_model

logging.basicConfig(level=logging.WARNING)
models = [load_model(sys.argv[1], expert_cache=size) for size in ("100%", "50%")]
print("loaded", file=sys.stderr)
inputs = torch.tensor([[1, 5, 9, 17]])
options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
whole, half = (model.generate(inputs, **options) for model in models)
for model in models:
    model.fate.close()
print(json.dumps([all(map(torch.equal, whole.logits, half.logits)), kernel_facts()]))
"""


def test_without_the_extension(checkpoint: Callable[[str], Path]) -> None:
    store = store_for(checkpoint("qwen2_moe"), "int4")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(store)], capture_output=True, text=True, env=os.environ | {"FATE_NATIVE": "0"}
    )
    assert done.returncode == 0, done.stderr
    same, facts = json.loads(done.stdout)
    assert same
    assert done.stderr.count("FATE_NATIVE=0 turns the C++ kernels off") == 1
    assert done.stderr.index("FATE_NATIVE=0") < done.stderr.index("loaded"), "said after there may be text to disturb"
    *sets, torch_ = facts
    assert all(not used for _, used, _ in sets)
    assert torch_[:2] == ["torch", True]
    assert "FATE_NATIVE=0" in torch_[2]


def test_facts_name_every_instruction_set() -> None:
    facts = native.kernel_facts()
    names = ["amx", "avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "neon", "portable"]
    assert [name for name, _, _ in facts] == names + (["torch"] if native.native is None else [])
    assert all(why for _, _, why in facts)
    assert sum(used for _, used, _ in facts) == 1
