"""What the cases share: tiny checkpoints, their stores with learned state, a GGUF file, a trace; and the text that is right."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fate_moe.errors import FateError
from fate_moe.store.convert import convert
from fate_moe.store.learned import save_gates, save_view_losses
from fate_moe.trace.schema import RoutingTrace, write_trace
from tests.support.checkpoints import tiny_checkpoint, tiny_model
from tests.support.engines import load_model
from tests.support.gguf_files import write_gguf
from tests.support.reading import snapshot

__all__ = ["STORES", "generate", "learned_arrays", "make_material", "text_of"]

# Family and precision of the stores: with biases and sinks, with shared experts, without either.
STORES = (("mixtral", "int4"), ("gpt_oss", "int4"), ("qwen2_moe", "lossless"), ("qwen2_moe", "int8"))
_SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
_PROMPT = [[3, 17, 55, 40, 4]]


def generate(model: Any) -> list[int]:
    """Six tokens after the prompt, greedily."""
    out = model.generate(torch.tensor(_PROMPT), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    return [int(token) for token in out[0]]


def text_of(store: Path, **options: Any) -> list[int]:
    """What the model of ``store`` writes with a third of its experts in memory. Closes it, so that it keeps what it learned."""
    model = load_model(store, **{"context_length": 32, "expert_cache": "35%", **options})
    try:
        return generate(model)
    finally:
        model.fate.close()


def learned_arrays(seed: int, num_layers: int = 2, num_experts: int = 8, hidden: int = 32) -> dict[str, Any]:
    """Gates and statistics of a generation ``seed``, to be told from those of another."""
    noise = torch.Generator().manual_seed(seed)
    gates = [torch.randn(num_experts, hidden + 1, generator=noise) for _ in range(num_layers)]
    return {"gates": gates, "statistics": {"recent": np.full(64, seed, np.float32)}, "losses": {2: float(seed), 3: seed / 2}}


def make_material(home: Path) -> dict[str, Any]:
    """Make everything below ``home`` and return the facts, which JSON can hold. ``FATE_HOME`` must be below it."""
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"text": {}, "stores": []}
    for family, precision in STORES:
        source = home / "checkpoints" / family
        if not source.exists():
            tiny_checkpoint(family, source, max_shard_size="40KB", **_SMALL)
        name = f"{family}-{precision}"
        convert(source, home / "plain" / name, precision)
        store = Path(shutil.copytree(home / "plain" / name, home / "stores" / name))
        facts["text"][name] = text_of(store)
        learned = learned_arrays(1)
        save_gates(store, learned["gates"], forecast=[torch.randn(8, 65) for _ in range(2)])
        save_view_losses(store, learned["losses"])
        if text_of(store, predictor="learned", look_ahead=1) != facts["text"][name]:
            raise FateError("the material itself is wrong: a predictor changed the text")
        facts["stores"].append(name)
    (home / "gguf").mkdir()
    write_gguf(home / "gguf" / "model.gguf", tiny_model("qwen2_moe", torch.bfloat16, **_SMALL), "qwen2moe")
    write_trace(home / "trace.npz", _trace())
    shutil.copytree(home, home.with_name("outside"), ignore=shutil.ignore_patterns("fate-home"))
    return facts


def _trace() -> RoutingTrace:
    dice = np.random.default_rng(1)
    experts = np.stack([[dice.permutation(8)[:2] for _ in range(2)] for _ in range(24)]).astype(np.uint8)
    probs = np.full(experts.shape, 0.5, np.float16)
    of_layer = {name: np.full((24, 2), 1e-3, np.float32) for name in ("stall", "seconds", "link", "overlap", "predicting")}
    extras: dict[str, Any] = {
        **of_layer,
        "lookups": (experts % 3).astype(np.uint8),
        "bytes_read": np.full((24, 2), 4096, np.int64),
        "predicted": np.full((24, 2, 8), 0.1, np.float16),
        "router_inputs": dice.normal(size=(24, 2, 16)).astype(np.float16),
        "embeddings": dice.normal(size=(24, 16)).astype(np.float16),
        "routers": dice.normal(size=(2, 8, 16)).astype(np.float32),
        "norms": np.ones((2, 16), np.float32),
        "reads": np.tile(np.array([[1, 0, 1, 1, 0.0, 1e-3]]), (4, 1)),
    }
    meta = {"model": "tiny", "expert_bytes": 4096, "policy": "lru", "predictor": "cross-layer", "slots": 8}
    return RoutingTrace(experts, probs, np.array([0, 12, 24]), np.array([8, 8]), extras, meta)


def expected_store(home: Path, name: str) -> dict[str, bytes]:
    """The files of the store ``name`` as conversion wrote them."""
    return snapshot(home / "plain" / name)


if __name__ == "__main__":
    import sys

    folder = Path(sys.argv[1])
    os.environ["FATE_HOME"] = str(folder / "fate-home")
    print(json.dumps(make_material(folder)))
