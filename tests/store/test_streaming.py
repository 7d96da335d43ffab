"""Conversion streams: its peak memory is near the largest tensor, whatever the model's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.io.tensorfile import place_tensors
from tests.support.checkpoints import tiny_checkpoint
from tests.support.children import Children

pytestmark = pytest.mark.slow

HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY = 512, 256, 48, 2, 8192
LARGEST_TENSOR_BYTES = VOCABULARY * HIDDEN * 2
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 2
EXPERTS_BYTES = LAYERS * EXPERTS * EXPERT_BYTES


def write_checkpoint(folder: Path) -> Path:
    """75 MB of experts, 38 MB a layer, in one file; every tensor repeats the same random bytes."""
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "vocab_size": VOCABULARY,
    }
    model = tiny_checkpoint(
        "qwen2_moe", folder / "shapes", torch.bfloat16, **{**sizes, "num_experts": 1, "moe_intermediate_size": 8}
    )
    config = json.loads((model / "config.json").read_text()) | sizes | {"num_hidden_layers": LAYERS}
    config.pop("layer_types", None)
    config["tie_word_embeddings"] = False
    heads = HIDDEN // config["num_attention_heads"]
    kv, shared = heads * config["num_key_value_heads"], config["shared_expert_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN))
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= dict.fromkeys((f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"), (HIDDEN,))
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            shapes |= {f"{layer}self_attn.{name}_proj.weight": (rows, HIDDEN), f"{layer}self_attn.{name}_proj.bias": (rows,)}
        shapes |= {f"{layer}self_attn.o_proj.weight": (HIDDEN, HIDDEN), f"{layer}mlp.gate.weight": (EXPERTS, HIDDEN)}
        shapes |= {f"{layer}mlp.shared_expert_gate.weight": (1, HIDDEN)}
        for expert, width in [("shared_expert", shared), *((f"experts.{e}", WIDTH) for e in range(EXPERTS))]:
            shapes |= dict.fromkeys((f"{layer}mlp.{expert}.{name}_proj.weight" for name in ("gate", "up")), (width, HIDDEN))
            shapes |= {f"{layer}mlp.{expert}.down_proj.weight": (HIDDEN, width)}
    data = torch.randn(LARGEST_TENSOR_BYTES // 2).bfloat16().view(torch.uint8).numpy().tobytes()
    (folder / "config.json").write_text(json.dumps(config))
    header, entries = place_tensors((name, "BF16", shape) for name, shape in shapes.items())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for entry in entries:
            file.write(data[: entry.length])
    return folder


@pytest.mark.parametrize("precision", ["lossless", "int4"])
def test_peak_memory_is_near_the_largest_tensor(tmp_path: Path, precision: str) -> None:
    (tmp_path / "large").mkdir()
    large = write_checkpoint(tmp_path / "large")
    small = tiny_checkpoint("qwen2_moe", tmp_path / "small", torch.bfloat16)
    children = Children(small)
    done = children.convert(large, tmp_path / "store", precision=precision, warm_up=str(small))
    children.close()
    assert done["status"] == 0
    written = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert written > EXPERTS_BYTES * (1 if precision == "lossless" else 0.28)
    increase = done["peak_bytes"] - done["rss_bytes"]
    print(f"{precision}: {increase / 2**20:.1f} MiB more for {EXPERTS_BYTES / 2**20:.0f} MiB of experts")
    # Names, recipes and manifest of 288 expert tensors, and a few copies of the largest tensor or one expert in fp32; a layer's
    # stack would be 38 MB more, the model 75 MB.
    assert increase < 3 * LARGEST_TENSOR_BYTES + 4 * EXPERT_BYTES
