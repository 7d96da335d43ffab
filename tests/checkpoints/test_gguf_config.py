"""Metadata of GGUF files that is missing, contradicts the tensors, or asks for what transformers' model does not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_moe.checkpoints.gguf import GgufCheckpoint
from fate_moe.cli import main
from fate_moe.errors import CheckpointError, FateError, UnsupportedModelError
from tests.support.checkpoints import tiny_model as tiny_common_model
from tests.support.gguf_files import Kind, rewrite_gguf, write_gguf
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    for architecture, family in (("qwen2moe", "qwen2_moe"), ("llama", "mixtral"), ("qwen3moe", "qwen3_moe")):
        write_gguf(folder / f"{architecture}.gguf", tiny_common_model(family), architecture)
    for architecture, family in (("granitemoe", "granitemoe"), ("dots1", "dots1"), ("glm4moe", "glm4_moe"), ("gpt-oss", "gpt_oss")):
        write_gguf(folder / f"{architecture}.gguf", tiny_model(family), architecture)
    write_gguf(folder / "deepseek2.gguf", tiny_model("deepseek_v3"), "deepseek2")
    return {path.stem: path for path in folder.iterdir()}


def config_of(path: Path) -> dict[str, Any]:
    checkpoint = GgufCheckpoint(path)  # its folder lasts as long as it does
    made: dict[str, Any] = json.loads((checkpoint.folder / "config.json").read_text())
    return made


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("qwen2moe", ".context_length"),
        ("qwen2moe", ".embedding_length"),
        ("qwen2moe", ".block_count"),
        ("qwen2moe", ".attention.head_count"),
        ("qwen2moe", ".attention.layer_norm_rms_epsilon"),
        ("qwen2moe", ".expert_count"),
        ("qwen2moe", ".expert_used_count"),
        ("granitemoe", ".logit_scale"),
        ("gpt-oss", ".attention.sliding_window"),
        ("deepseek2", ".attention.kv_lora_rank"),
        ("deepseek2", ".rope.dimension_count"),
        ("deepseek2", ".expert_group_used_count"),
        ("dots1", ".expert_gating_func"),
    ],
)
def test_a_missing_required_key_is_named(tmp_path: Path, files: dict[str, Path], architecture: str, key: str) -> None:
    path = rewrite_gguf(files[architecture], tmp_path / "model.gguf", drop=[key])
    with pytest.raises(CheckpointError, match=f"model.gguf: .*{architecture}{key} is missing"):
        GgufCheckpoint(path)


@pytest.mark.parametrize(
    ("architecture", "put", "said"),
    [
        ("qwen2moe", {".expert_used_count": 100}, "takes 100 of 8 experts"),
        ("qwen2moe", {".expert_used_count": 0}, "expert_used_count is 0"),
        ("qwen2moe", {".block_count": 9}, "no tensors of layer 2"),
        ("qwen2moe", {".block_count": 1}, "has tensors of layer 1, but its metadata counts 1 layers"),
        ("qwen2moe", {".expert_count": 6}, r"expert_count = 6, but ffn_gate_inp.weight is \[8, 64\]"),
        ("qwen2moe", {".embedding_length": 32}, r"embedding_length = 32, but attn_norm.weight is \[64\]"),
        ("qwen2moe", {".vocab_size": 64}, r"vocab_size = 64, but token_embd.weight is \[128, 64\]"),
        ("qwen2moe", {".expert_feed_forward_length": 31}, "expert_feed_forward_length = 31"),
        ("qwen2moe", {".attention.head_count": 8}, "attn_q.weight .* cannot become"),
        ("qwen2moe", {".attention.head_count_kv": 1}, "16 rows of attn_k.weight"),
        ("qwen2moe", {".attention.layer_norm_rms_epsilon": float("nan")}, "'nan', not a finite number"),
        ("qwen2moe", {".context_length": "long"}, "'long', not a positive integer"),
        (
            "qwen3moe",
            {f".{key}": 8 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")},
            "16 rows of attn_k.weight",
        ),
        ("qwen3moe", {".attention.key_length": 4_000_000_000}, "rows of attn_k.weight"),
        ("qwen3moe", {".attention.head_count": 4_000_000_000}, "cannot become"),
        ("qwen3moe", {".block_count": 4_000_000_000}, "no tensors of layer 2"),
        ("qwen3moe", {".rope.dimension_count": 4_000_000_000}, "turns 4000000000 of 16 columns"),
        (
            "deepseek2",
            {".rope.dimension_count": 4_000_000_000, ".attention.key_length_mla": 4_000_000_001},
            "rows of attn_kv_a_mqa",
        ),
        ("glm4moe", {".nextn_predict_layers": 9}, "counts no more layers"),
        ("glm4moe", {".nextn_predict_layers": 2}, "has tensors of layer 3, but its metadata counts 3 layers and 2 that predict"),
        ("glm4moe", {".expert_shared_count": 3}, "expert_shared_count = 3"),
        ("dots1", {".leading_dense_block_count": 2}, "lacks blk.1.ffn_gate.weight"),
        ("deepseek2", {".expert_group_count": 3}, "from 1 of 3 groups of 8"),
        ("deepseek2", {".attention.q_lora_rank": 8}, "q_lora_rank = 8"),
    ],
)
def test_metadata_that_contradicts_the_tensors(
    tmp_path: Path, files: dict[str, Path], architecture: str, put: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        GgufCheckpoint(rewrite_gguf(files[architecture], tmp_path / "model.gguf", put=put))


@pytest.mark.parametrize(
    ("architecture", "put", "said"),
    [
        ("qwen2moe", {".final_logit_softcapping": 30.0}, "qwen2moe.final_logit_softcapping = 30"),
        ("qwen2moe", {".attention.scale": 0.1}, "qwen2moe.attention.scale"),
        ("qwen2moe", {".expert_weights_scale": 2.5}, "qwen2moe.expert_weights_scale"),
        ("qwen2moe", {".attention.causal": False}, "qwen2moe.attention.causal = False"),
        ("qwen2moe", {".attention.temperature_scale": 0.1}, "attention.temperature_scale"),
        ("qwen2moe", {".swiglu_clamp_exp": [7.0, 7.0]}, "swiglu_clamp_exp"),
        ("qwen2moe", {".expert_group_count": 4}, "expert_group_count"),
        ("qwen2moe", {".expert_gating_func": 2}, "expert_gating_func is 2, and transformers' qwen2_moe has 1"),
        ("qwen2moe", {".attention.head_count": [4, 2]}, r"attention.head_count differs between layers"),
        ("qwen2moe", {".attention.head_count_kv": [2, 1]}, r"attention.head_count_kv differs between layers"),
        ("qwen2moe", {".rope.dimension_count": 8}, "turns 8 columns of each head"),
        ("qwen2moe", {".rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ("qwen2moe", {"general.type": "adapter"}, "of the type 'adapter'"),
        ("gpt-oss", {".attention.sliding_window_pattern": 6}, "other layers than every second"),
        ("gpt-oss", {".rope.freq_base_swa": 5.0}, "another rope.freq_base"),
        ("deepseek2", {".expert_gating_func": 1}, "expert_gating_func is 1, and transformers' deepseek_v3 has 2"),
        ("granitemoe", {".attention.sliding_window": 64}, "granitemoe.attention.sliding_window = 64"),
        ("qwen3moe", {".attention.value_length": 8}, "values other columns than keys"),
        ("qwen3moe", {".a_key_of_tomorrow": 1, ".another": 2, ".third": 3, ".fourth": 4}, "a_key_of_tomorrow = 1.* and 1 more"),
    ],
)
def test_metadata_that_transformers_cannot_follow(
    tmp_path: Path, files: dict[str, Path], architecture: str, put: dict[str, Any], said: str
) -> None:
    path = rewrite_gguf(files[architecture], tmp_path / "model.gguf", put=put)
    with pytest.raises(UnsupportedModelError, match=said):
        GgufCheckpoint(path)


def test_values_that_change_nothing_are_accepted(tmp_path: Path, files: dict[str, Path]) -> None:
    put = {
        ".attention.head_count": [4, 4],
        ".attention.head_count_kv": [2, 2],
        ".expert_weights_scale": 0.0,
        ".expert_group_count": 1,
        ".attention.sliding_window": 0,
        ".pooling_type": 0,
        ".attention.causal": True,
        ".logit_scale": 1.0,
        ".tensor_data_layout": "Meta AI original pth",
        ".rope.scaling.finetuned": True,
        ".rope.dimension_sections": [4, 2, 2, 0],
        "general.file_type": 15,
        "general.quantization_version": 2,
        "quantize.imatrix.file": "imatrix.dat",
        "mradermacher.quantized_by": "someone",
    }
    same = rewrite_gguf(files["qwen2moe"], tmp_path / "model.gguf", put=put)
    assert config_of(same) == config_of(files["qwen2moe"])


def test_normalised_weights_of_families_that_always_normalise(tmp_path: Path, files: dict[str, Path]) -> None:
    same = rewrite_gguf(files["llama"], tmp_path / "model.gguf", put={".expert_weights_norm": True})
    assert config_of(same) == config_of(files["llama"])


def test_zero_scales_are_absent_ones(tmp_path: Path, files: dict[str, Path]) -> None:
    put = {".expert_weights_scale": 0.0}
    assert config_of(rewrite_gguf(files["dots1"], tmp_path / "dots.gguf", put=put))["routed_scaling_factor"] == 1.0
    granite = config_of(rewrite_gguf(files["granitemoe"], tmp_path / "granite.gguf", drop=[".attention.scale"]))
    assert granite["attention_multiplier"] == pytest.approx(16**-0.5)  # transformers' default is 1


def test_defaults_are_those_of_llama_cpp(tmp_path: Path, files: dict[str, Path]) -> None:
    config = config_of(rewrite_gguf(files["llama"], tmp_path / "mixtral.gguf", drop=[".rope.freq_base"]))
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    glm = rewrite_gguf(files["glm4moe"], tmp_path / "glm.gguf", drop=[".rope.dimension_count", ".expert_weights_norm"])
    assert config_of(glm)["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert config_of(glm)["norm_topk_prob"] is False


def test_heads_wider_than_the_hidden_size_of_glm(tmp_path: Path) -> None:
    """GLM-4.5-Air has 96 heads of 128 and 4096 columns; its class has no setting for that."""
    model = tiny_model("glm4_moe")
    config = type(model.config)(**{**model.config.to_dict(), "head_dim": 32})
    write_gguf(tmp_path / "air.gguf", type(model)(config), "glm4moe")
    assert GgufCheckpoint(tmp_path / "air.gguf").shape("model.layers.0.self_attn.q_proj.weight") == (128, 64)


def test_ernie_of_more_layers_than_the_default(tmp_path: Path) -> None:
    """ERNIE-4.5-300B has 54 layers, all but the first ones with experts."""
    config = tiny_model("ernie4_5_moe").config
    write_gguf(tmp_path / "ernie.gguf", tiny_model("ernie4_5_moe"), "ernie4_5-moe")
    assert config_of(tmp_path / "ernie.gguf")["moe_layer_end_index"] == config.num_hidden_layers - 1


def test_ends_of_a_turn_end_the_text(tmp_path: Path, files: dict[str, Path]) -> None:
    put = {f"tokenizer.ggml.{name}_token_id": value for name, value in (("eos", 2), ("eot", 5), ("padding", 4294967295))}
    config = config_of(rewrite_gguf(files["qwen2moe"], tmp_path / "model.gguf", put=put))
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == ([2, 5], None, 0)


def test_a_vocabulary_larger_than_the_embeddings(tmp_path: Path, files: dict[str, Path]) -> None:
    tokens = {"tokenizer.ggml.tokens": [f"<{i}>" for i in range(129)]}
    with pytest.raises(CheckpointError, match=r"vocabulary has 129 tokens, token_embd.weight 128 rows"):
        GgufCheckpoint(rewrite_gguf(files["qwen2moe"], tmp_path / "model.gguf", put=tokens))


def test_other_files_of_a_model_are_named(tmp_path: Path, files: dict[str, Path]) -> None:
    named = {"clip": "a vision projector", "gptoss": "Ollama's own", "llama4": "'llama4' is not supported", "phimoe": "safetensors"}
    for architecture, said in named.items():
        path = rewrite_gguf(files["llama"], tmp_path / f"{architecture}.gguf", put={"general.architecture": architecture})
        with pytest.raises(UnsupportedModelError, match=said):
            GgufCheckpoint(path)


def test_blocks_of_another_version_are_refused(tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
    write_gguf(tmp_path / "q8.gguf", tiny_common_model("qwen2_moe", **wide), "qwen2moe", Kind.Q8_0)
    put = {"general.quantization_version": 1}
    with pytest.raises(UnsupportedModelError, match="blocks are of version 1"):
        GgufCheckpoint(rewrite_gguf(tmp_path / "q8.gguf", tmp_path / "old.gguf", put=put))


@pytest.mark.parametrize("verb", ["plan", "inspect", "convert"])
def test_every_verb_refuses_before_it_writes(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    path = rewrite_gguf(files["qwen2moe"], tmp_path / "model.gguf", drop=[".expert_used_count"])
    arguments = [verb, str(path), *([str(tmp_path / "store")] if verb == "convert" else [])]
    assert main(arguments) == 1
    assert capsys.readouterr().err.count("expert_used_count is missing") == 1
    assert sorted(tmp_path.iterdir()) == [path]


def test_what_a_folder_of_gguf_files_means(tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(files["qwen2moe"], tmp_path / "MODEL.GGUF")
    shutil.copy(files["llama"], tmp_path / "mmproj-F16.gguf")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "qwen2_moe"
    shutil.copy(files["llama"], tmp_path / "b.gguf")
    assert main(["plan", str(tmp_path)]) == 1
    assert "has several GGUF files (MODEL.GGUF, b.gguf); give one of them" in capsys.readouterr().err


def test_links_and_names_without_a_suffix(tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(files["qwen2moe"], tmp_path / "sha256-abc")
    (tmp_path / "link.gguf").symlink_to("sha256-abc")
    for name in ("sha256-abc", "link.gguf"):
        assert main(["inspect", str(tmp_path / name), "--json"]) == 0, name
        assert json.loads(capsys.readouterr().out)["family"] == "qwen2_moe"


def test_zeros_are_not_taken_for_a_routers_bias_where_llama_cpp_wants_one(tmp_path: Path, files: dict[str, Path]) -> None:
    def without(architecture: str) -> Path:
        layers = {f"blk.{layer}.exp_probs_b.bias": None for layer in range(4)}
        return rewrite_gguf(files[architecture], tmp_path / f"{architecture}.gguf", tensors=layers)

    bias = GgufCheckpoint(without("dots1")).read("model.layers.1.mlp.gate.e_score_correction_bias")
    assert np.array_equal(bias.numpy(), np.zeros(8, np.float32))
    with pytest.raises(CheckpointError, match=r"lacks blk.1.exp_probs_b.bias"):
        GgufCheckpoint(without("glm4moe"))


@pytest.mark.slow
def test_flipped_bits_of_a_header_give_one_line(tmp_path: Path, files: dict[str, Path]) -> None:
    """Whatever a header says, the file is read or refused as ours refuse: one sentence, nothing of the file's bytes in it."""
    whole, random = files["qwen3moe"].read_bytes(), np.random.default_rng(0)
    end, said = whole.index(b"output.weight"), []
    for _ in range(80):
        torn = bytearray(whole)
        torn[random.integers(end)] ^= 1 << random.integers(8)
        (tmp_path / "torn.gguf").write_bytes(torn)
        try:
            GgufCheckpoint(tmp_path / "torn.gguf")
        except FateError as error:
            said.append(str(error))
    assert len(said) > 20
    assert all(text.isprintable() for text in said)
