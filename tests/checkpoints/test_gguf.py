"""GGUF files, written here with the names and layouts of llama.cpp's converter, and read back.

Files by the same writer were also given to llama.cpp (llama-cpp-python 0.3.36), all matrices fp32, dots1 and olmoe with as many key
heads as query heads, since it takes nothing else there: its logits and transformers' differ by 0.012 at most, of up to 4.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from fate_moe.checkpoints.gguf import GgufCheckpoint
from fate_moe.checkpoints.gguf_config import ARCHITECTURES
from fate_moe.cli import main
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.store.convert import convert
from fate_moe.store.open import load_dense, open_store
from tests.support.checkpoints import tiny_model as tiny_common_model
from tests.support.engines import load_model
from tests.support.gguf_files import Kind, write_gguf
from tests.support.tiny import tiny_model

PAIRS = [(architecture, family) for architecture, families in ARCHITECTURES.items() for family in families]
TOKENS = torch.tensor([[3, 17, 55, 90, 4, 8, 101]])


@pytest.mark.parametrize(("architecture", "family"), PAIRS)
def test_every_architecture_is_read_back(tmp_path: Path, architecture: str, family: str) -> None:
    """Configuration and tensors together: a model made from them, in fp32, gives the logits of the written one."""
    model = tiny_model(family)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.bfloat16())
    if family == "qwen3_moe":  # llama.cpp always does this
        for layer in model.model.layers:
            layer.mlp.gate.norm_topk_prob = True
    write_gguf(tmp_path / "tiny.gguf", model, architecture)
    checkpoint = GgufCheckpoint(tmp_path / "tiny.gguf")
    read = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(checkpoint.folder), dtype=torch.float32
    ).eval()
    loaded = read.load_state_dict({name: checkpoint.read(name).float() for name in checkpoint.names}, strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= set(model.all_tied_weights_keys)
    with torch.no_grad():
        assert (read(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-5
    store = open_store(convert(tmp_path / "tiny.gguf", tmp_path / "store"))
    assert (store.manifest.family, store.manifest.dtype) == (family, "BF16")
    held = model.state_dict()
    dense = load_dense(store)
    assert dense.keys() >= {name for name in held if ".experts." not in name} - set(model.all_tied_weights_keys)
    assert all(torch.equal(tensor.float(), held[name]) for name, tensor in dense.items())
    ours = load_model(tmp_path / "store", expert_cache="25%")
    with torch.no_grad():
        assert ours(TOKENS).logits.isfinite().all()
    ours.fate.close()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_older_files_of_deepseek(tmp_path: Path, family: str) -> None:
    model = tiny_model(family).bfloat16()
    write_gguf(tmp_path / "old.gguf", model, "deepseek2", absorbed=False)
    checkpoint = GgufCheckpoint(tmp_path / "old.gguf")
    held = model.state_dict()
    assert set(checkpoint.names) == held.keys()
    assert all(torch.equal(checkpoint.read(name).bfloat16(), held[name].bfloat16()) for name in held)
    config = json.loads((checkpoint.folder / "config.json").read_text())
    assert (config["qk_nope_head_dim"], config["v_head_dim"]) == (8, 16)


def test_long_contexts_of_deepseek(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 64}
    model = tiny_common_model("deepseek_v2", rope_parameters={**yarn, "mscale": 0.707, "mscale_all_dim": 0.707})
    write_gguf(tmp_path / "long.gguf", model, "deepseek2")
    checkpoint = GgufCheckpoint(tmp_path / "long.gguf")
    rotary = json.loads((checkpoint.folder / "config.json").read_text())["rope_parameters"]
    assert {name: rotary[name] for name in yarn} == yarn
    assert rotary["mscale"] == rotary["mscale_all_dim"] == pytest.approx(0.707)


WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}


def wide_model() -> Any:
    """A model whose rows are multiples of every kind's block."""
    return tiny_common_model("qwen2_moe", **WIDE)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.F16])
def test_kinds_that_gguf_writes(tmp_path: Path, kind: Any) -> None:
    model = wide_model()
    write_gguf(tmp_path / "tiny.gguf", model, "qwen2moe", kind)
    checkpoint = GgufCheckpoint(tmp_path / "tiny.gguf")
    assert set(checkpoint.names) == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        error = (checkpoint.read(name).float() - tensor).norm() / tensor.norm()
        assert error < (0.1 if kind in (Kind.Q4_0, Kind.Q5_1) else 0.01), name


# Where blocks of each kind have their fp16 scales, in bytes.
SCALES: dict[Any, tuple[int, ...]] = {
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
    Kind.IQ1_S: (0,), Kind.IQ2_XXS: (0,), Kind.IQ2_XS: (0,), Kind.IQ2_S: (0,), Kind.IQ3_XXS: (0,), Kind.IQ3_S: (0,),
    Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,),
}  # fmt: skip


def random_blocks(data: np.ndarray, kind: Any) -> np.ndarray:
    """Random blocks with finite scales, which are valid weights, for as many weights as ``data`` has."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(data.size)
    blocks = random.integers(0, 256, (*data.shape[:-1], data.shape[-1] // weights, size), dtype=np.uint8)
    for offset in SCALES[kind]:
        scale = random.uniform(0.001, 0.01, (*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., offset : offset + 2] = scale.view(np.uint8)
    return blocks.reshape(*data.shape[:-1], -1)


def q4_k(block: np.ndarray) -> list[float]:
    """llama.cpp's documentation of the block, a weight at a time: d, dmin, 12 bytes of 6-bit scales and minima, 128 of nibbles."""
    (d, dmin), scales, codes = block[:4].view(np.float16).astype(np.float32), [int(x) for x in block[4:16]], block[16:]
    out = []
    for i in range(256):
        j = i // 32
        if j < 4:
            scale, minimum = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6 << 4)
            minimum = (scales[j + 4] >> 4) | (scales[j] >> 6 << 4)
        code = int(codes[i // 64 * 32 + i % 32]) >> (4 * (j % 2)) & 15
        out.append(d * scale * code - dmin * minimum)
    return out


def q6_k(block: np.ndarray) -> list[float]:
    """128 bytes of low nibbles, 64 of high pairs of bits, 16 signed scales, d."""
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), block[208:].view(np.float16)[0]
    out = []
    for i in range(256):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        code = int(low[half * 64 + quarter % 2 * 32 + place]) >> (quarter // 2 * 4) & 15
        code |= (int(high[half * 32 + place]) >> (quarter * 2) & 3) << 4
        out.append(np.float32(d) * int(scales[half * 8 + quarter * 2 + place // 16]) * (code - 32))
    return [float(number) for number in out]


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_kinds_that_only_llama_cpp_writes(tmp_path: Path, kind: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", wide_model(), "qwen2moe", kind, random_blocks)
    checkpoint = GgufCheckpoint(tmp_path / "tiny.gguf")
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    down = raw["blk.1.ffn_down_exps.weight"]
    got = checkpoint.read("model.layers.1.mlp.experts.down_proj", 5)
    assert got.isfinite().all()
    assert torch.equal(got[0], torch.from_numpy(gguf.dequantize(down.data, kind)[5]).bfloat16())
    if by_hand := {Kind.Q4_K: q4_k, Kind.Q6_K: q6_k}.get(kind):
        blocks = np.array(down.data[5][:4]).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
        want = torch.tensor(np.array([by_hand(block) for block in blocks])).view(4, 256)
        assert torch.allclose(got[0, :4].double(), want.double(), rtol=2**-8, atol=1e-6)
    both = checkpoint.read("model.layers.1.mlp.experts.gate_up_proj")
    halves = [torch.from_numpy(gguf.dequantize(raw[f"blk.1.ffn_{half}_exps.weight"].data, kind)) for half in ("gate", "up")]
    assert torch.equal(both, torch.cat(halves, 1).bfloat16())


def test_split_files(tmp_path: Path) -> None:
    model = wide_model()
    write_gguf(tmp_path / "single.gguf", model, "qwen2moe")
    write_gguf(tmp_path / "parts.gguf", model, "qwen2moe", split_max_tensors=12)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    single, split = GgufCheckpoint(tmp_path / "single.gguf"), GgufCheckpoint(parts[1])
    assert set(single.names) == set(split.names)
    assert all(torch.equal(single.read(name), split.read(name)) for name in single.names)
    parts[-1].unlink()
    with pytest.raises(CheckpointError, match=f"{parts[-1].name} is missing"):
        GgufCheckpoint(parts[0])


def test_plan_and_inspect_read_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = wide_model()
    write_gguf(tmp_path / "tiny.gguf", model, "qwen2moe", Kind.Q8_0)
    assert main(["inspect", str(tmp_path / "tiny.gguf"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["layers"], facts["experts"], facts["top_k"]) == ("qwen2_moe", 2, 8, 2)
    assert facts["precisions"]["lossless"]["expert_bytes"] == 3 * 256 * 256 * 2
    assert facts["dense_bytes"] == 2 * sum(x.numel() for name, x in model.state_dict().items() if ".experts." not in name)
    assert main(["plan", str(tmp_path / "tiny.gguf"), "--json", "--precision", "lossless"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["family"], made["num_experts"], made["slot_bytes"]) == ("qwen2_moe", 16, 3 * 256 * 256 * 2)


def test_a_tokenizer_beside_the_file_is_used(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", wide_model(), "qwen2moe", vocabulary=False)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    store = convert(tmp_path / "tiny.gguf", tmp_path / "store")
    assert (store / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (store / "tokenizer_config.json").exists()


def other_file(path: Path, architecture: str, change: Callable[[Any], None] = lambda writer: None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    change(writer)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unsupported_architecture(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'grok' is not supported"):
        convert(other_file(tmp_path / "other.gguf", "grok"), tmp_path / "store")


def test_an_architecture_without_experts(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'llama' model has no experts"):
        convert(other_file(tmp_path / "dense.gguf", "llama"), tmp_path / "store")


def test_incomplete_metadata(tmp_path: Path) -> None:
    file = other_file(tmp_path / "bare.gguf", "qwen3moe", lambda writer: writer.add_expert_count(8))
    with pytest.raises(CheckpointError, match=r"qwen3moe\.context_length is missing"):
        convert(file, tmp_path / "store")


def test_a_truncated_file(tmp_path: Path) -> None:
    (tmp_path / "truncated.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        convert(tmp_path / "truncated.gguf", tmp_path / "store")
