"""The GGUF file holds the checkpoint's weights under the names, shapes and types that llama.cpp reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from benchmarks.gguf_export import export
from fate_moe.checkpoints.source import Checkpoint
from fate_moe.errors import UnsupportedModelError
from tests.support.checkpoints import tiny_checkpoint


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe"])
def test_weights(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(checkpoint(family))
    reader = gguf.GGUFReader(export(checkpoint(family), tmp_path / "model.gguf"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def held(name: str) -> np.ndarray:
        return np.asarray(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))

    gates = [source.read(f"model.layers.1.mlp.experts.{expert}.gate_proj.weight").numpy() for expert in range(8)]
    stacked = held("blk.1.ffn_gate_exps.weight")
    assert stacked.shape == (8, *gates[0].shape)
    assert tensors["blk.1.ffn_gate_exps.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    for gate, got in zip(gates, stacked, strict=True):
        blocks = gate.reshape(-1, 32)
        step = np.abs(blocks).max(1, keepdims=True) / 8  # codes -8..7: the side that has no eighth step is off by up to one
        assert (np.abs(got.reshape(-1, 32) - blocks) <= 1.01 * step).all()
    np.testing.assert_array_equal(held("blk.0.ffn_gate_inp.weight"), source.read("model.layers.0.mlp.gate.weight").numpy())
    np.testing.assert_array_equal(held("output_norm.weight"), source.read("model.norm.weight").numpy())
    assert len(tensors) == len({re.sub(r"experts\.\d+", "experts", name) for name in source.names})
    field = reader.get_field(f"{family.replace('_', '')}.expert_used_count")
    assert field is not None
    assert field.contents() == 2


def test_a_tied_head_is_written_twice(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2_moe", tmp_path / "tied", tie_word_embeddings=True)
    reader = gguf.GGUFReader(export(folder, tmp_path / "model.gguf"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    np.testing.assert_array_equal(tensors["output.weight"].data, tensors["token_embd.weight"].data)


def test_normalized_routing_is_written_for_a_graph_that_normalizes(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2_moe", tmp_path / "normalized", norm_topk_prob=True, qkv_bias=False)
    with pytest.raises(UnsupportedModelError, match=r"shared_expert_gate.weight is not zero"):
        export(folder, tmp_path / "model.gguf")
    weights = load_file(folder / "model.safetensors")
    half_open = {name: torch.zeros_like(w) if "shared_expert_gate" in name else w for name, w in weights.items()}
    save_file(half_open, folder / "model.safetensors")
    reader = gguf.GGUFReader(export(folder, tmp_path / "model.gguf"))
    assert reader.fields["general.architecture"].contents() == "ernie4_5-moe"
    assert reader.fields["ernie4_5-moe.interleave_moe_layer_step"].contents() == 1
    assert reader.fields["ernie4_5-moe.expert_shared_feed_forward_length"].contents() > 0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = AutoConfig.from_pretrained(folder)
    size = config.hidden_size // config.num_attention_heads

    def held(name: str) -> np.ndarray:
        return np.asarray(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))

    # Rotary pairs: dimensions d and d + size/2 of a head become neighbours.
    query = weights["model.layers.0.self_attn.q_proj.weight"].numpy()[:size]
    order = [half * size // 2 + pair for pair in range(size // 2) for half in range(2)]
    np.testing.assert_allclose(held("blk.0.attn_q.weight")[:size], query[order], atol=np.abs(query).max() / 7)
    down = weights["model.layers.0.mlp.shared_expert.down_proj.weight"].numpy()
    np.testing.assert_allclose(held("blk.0.ffn_down_shexp.weight"), down / 2, atol=np.abs(down).max() / 14)


def test_other_families_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="gpt_oss cannot be written as GGUF"):
        export(checkpoint("gpt_oss"), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
