"""GGUF files, written here as llama.cpp's converter names and lays things out, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fate_moe.core import ExpertId
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.store.convert import convert
from fate_moe.store.open import load_dense, open_store
from fate_moe.store.reader import DiskSource
from tests.checkpoints import tiny_model
from tests.conftest import load_model
from tests.store.reading import same_bits
from tests.store.test_convert import read_parts

Kind = gguf.GGMLQuantizationType
_IN_BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SIZES = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}


def write_gguf(path: Path, model: Any, architecture: str, kind: Any) -> dict[str, torch.Tensor]:
    """``model`` as a GGUF file whose matrices are ``kind``; what its parameters are after that, in bf16."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    kept: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.float().numpy()
        if tensor.ndim == 1 or "_inp" in name:
            writer.add_tensor(name, data)
            return tensor.bfloat16()
        packed = gguf.quants.quantize(data, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        return torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind))).bfloat16()

    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem in _OUTSIDE:
            kept[name] = put(f"{_OUTSIDE[stem]}.{suffix}", tensor)
            continue
        layer, rest = stem.removeprefix("model.layers.").split(".", 1)
        if suffix == "gate_up_proj":
            halves = [
                put(f"blk.{layer}.ffn_{half}_exps.weight", part)
                for half, part in zip(("gate", "up"), tensor.chunk(2, 1), strict=True)
            ]
            kept[name] = torch.cat(halves, 1)
        elif suffix == "down_proj":
            kept[name] = put(f"blk.{layer}.ffn_down_exps.weight", tensor)
        else:
            flat = tensor[0] if rest == "mlp.shared_expert_gate" else tensor
            kept[name] = put(f"blk.{layer}.{_IN_BLOCK[rest]}.{suffix}", flat).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.mark.parametrize(
    ("family", "architecture", "kind"),
    [("qwen3_moe", "qwen3moe", Kind.Q8_0), ("qwen3_moe", "qwen3moe", Kind.Q4_0), ("qwen2_moe", "qwen2moe", Kind.Q8_0)],
)
def test_every_tensor_arrives(tmp_path: Path, family: str, architecture: str, kind: Any) -> None:
    sizes = SIZES if family == "qwen2_moe" else {name: size for name, size in SIZES.items() if "shared" not in name}
    kept = write_gguf(tmp_path / "tiny.gguf", tiny_model(family, **sizes), architecture, kind)
    store = open_store(convert(tmp_path / "tiny.gguf", tmp_path / "store"))
    assert store.manifest.family == family
    dense = load_dense(store)
    assert dense.keys() == {name for name in kept if ".experts." not in name}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in dense.items())
    source = DiskSource(store)
    for layer in range(2):
        for expert in range(8):
            for name, tensor in read_parts(source, ExpertId(layer, expert)).items():
                assert same_bits(tensor, kept[f"model.layers.{layer}.mlp.experts.{name}"][expert])
    source.close()
    model = load_model(tmp_path / "store", expert_cache="25%")
    assert model.config.num_experts_per_tok == 2
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    model.fate.close()


def test_an_architecture_without_names(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "grok")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'grok'"):
        convert(tmp_path / "other.gguf", tmp_path / "store")


def test_a_torn_file(tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(CheckpointError, match="no whole GGUF file"):
        convert(tmp_path / "torn.gguf", tmp_path / "store")
