"""Tensors of GGUF files that are missing, superfluous, of another shape, or under older names."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fate_moe.checkpoints.gguf import GgufCheckpoint
from fate_moe.engine.prepare import load_tokenizer
from fate_moe.errors import CheckpointError, ConfigError, UnsupportedModelError
from fate_moe.store.convert import convert
from fate_moe.store.open import open_store
from tests.support.checkpoints import tiny_model
from tests.support.gguf_files import rewrite_gguf, write_gguf
from tests.support.tiny import tiny_model as tiny_other_model

FURTHER = "predicts further tokens (MTP), which is not used"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("names")
    for architecture, family in (("llama", "mixtral"), ("qwen2moe", "qwen2_moe"), ("deepseek2", "deepseek_v3")):
        write_gguf(folder / f"{architecture}.gguf", tiny_model(family), architecture)
    write_gguf(folder / "glm4moe.gguf", tiny_other_model("glm4_moe"), "glm4moe")
    return {path.stem: path for path in folder.iterdir()}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


def test_tensors_without_a_place_are_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    for name in ("blk.0.attn_output.bias", "blk.1.ffn_up_exps.scale", "cls.weight", "blk.0.ffn_down.weight"):
        path = rewrite_gguf(files["qwen2moe"], tmp_path / "m.gguf", tensors={name: np.ones((64, 64), np.float32)})
        with pytest.raises(UnsupportedModelError, match=f"m.gguf: transformers' qwen2_moe has no place for {name}"):
            GgufCheckpoint(path)


def test_tensors_that_need_not_be_read_are_named(tmp_path: Path, files: dict[str, Path]) -> None:
    more = {name: np.ones(64, np.float32) for name in ("v.patch_embd.weight", "mm.0.weight", "blk.0.attn_rot_embd.weight")}
    checkpoint = GgufCheckpoint(rewrite_gguf(files["qwen2moe"], tmp_path / "m.gguf", tensors=more))
    assert checkpoint.unread.keys() == more.keys()
    assert checkpoint.unread["mm.0.weight"] == "sees or hears, and only text is read"
    assert checkpoint.names == GgufCheckpoint(files["qwen2moe"]).names


def test_blocks_that_predict_further_tokens_are_named(tmp_path: Path, files: dict[str, Path]) -> None:
    block = {f"blk.4.{part}.weight": np.ones(64, np.float32) for part in ("nextn.eh_proj", "attn_norm")}
    path = rewrite_gguf(files["glm4moe"], tmp_path / "m.gguf", tensors=block)
    assert GgufCheckpoint(path).unread == dict.fromkeys(block, FURTHER)
    unsaid = rewrite_gguf(path, tmp_path / "unsaid.gguf", drop=[".nextn_predict_layers"], put={".block_count": 4})
    assert GgufCheckpoint(unsaid).unread == dict.fromkeys(block, FURTHER)


def test_missing_tensors_are_named(tmp_path: Path, files: dict[str, Path]) -> None:
    for name in ("blk.1.ffn_up_exps.weight", "blk.0.attn_q.bias", "output_norm.weight", "token_embd.weight"):
        with pytest.raises(CheckpointError, match=f"m.gguf: it lacks {name}"):
            GgufCheckpoint(rewrite_gguf(files["qwen2moe"], tmp_path / "m.gguf", tensors={name: None}))
    renamed = {"blk.0.attn_v.weight": None, "blk.0.attn_value.weight": np.ones((32, 64), np.float32)}
    with pytest.raises(CheckpointError, match=r"lacks blk.0.attn_v.weight \(it has blk.0.attn_value.weight instead\)"):
        GgufCheckpoint(rewrite_gguf(files["qwen2moe"], tmp_path / "m.gguf", tensors=renamed))


def test_tensors_of_another_shape_are_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    for name, shape in (
        ("blk.0.attn_v.weight", (64, 32)),
        ("blk.1.ffn_gate_exps.weight", (8, 64, 32)),
        ("output_norm.weight", (32,)),
    ):
        with pytest.raises(CheckpointError, match=f"{name} .* cannot become .*, the shape that its metadata describes"):
            GgufCheckpoint(rewrite_gguf(files["qwen2moe"], tmp_path / "m.gguf", tensors={name: np.ones(shape, np.float32)}))


def test_experts_one_by_one_as_mixtral_had_them(tmp_path: Path, files: dict[str, Path]) -> None:
    old: dict[str, np.ndarray | None] = {}
    for name, tensor in tensors_of(files["llama"]).items():
        if "_exps" in name:
            old[name] = None
            old |= {name.replace("_exps", f".{expert}"): tensor[expert] for expert in range(8)}
    path = rewrite_gguf(files["llama"], tmp_path / "old.gguf", tensors=old)
    new, read = GgufCheckpoint(files["llama"]), GgufCheckpoint(path)
    assert new.names == read.names
    for name in new.names:
        assert torch.equal(read.read(name), new.read(name)), name
        if ".experts." in name:
            assert torch.equal(read.read(name, 5), new.read(name, 5)), name
    store = open_store(convert(path, tmp_path / "store"))
    assert store.manifest.num_experts == 16
    with pytest.raises(CheckpointError, match=r"it lacks blk.1.ffn_up.7.weight"):
        GgufCheckpoint(rewrite_gguf(path, tmp_path / "torn.gguf", tensors={"blk.1.ffn_up.7.weight": None}))


def test_keys_and_values_of_deepseek_in_both_forms(tmp_path: Path) -> None:
    """ik_llama.cpp's files have the whole matrix beside its halves."""
    model = tiny_model("deepseek_v3").bfloat16()
    write_gguf(tmp_path / "whole.gguf", model, "deepseek2", absorbed=False)
    write_gguf(tmp_path / "halves.gguf", model, "deepseek2")
    halves = {name: tensor for name, tensor in tensors_of(tmp_path / "halves.gguf").items() if name.endswith("_b.weight")}
    halves = {name: tensor for name, tensor in halves.items() if ".attn_k_b" in name or ".attn_v_b" in name}
    both = GgufCheckpoint(rewrite_gguf(tmp_path / "whole.gguf", tmp_path / "both.gguf", tensors=halves))
    assert set(both.unread) == set(halves)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(both.read(name), model.state_dict()[name])


@pytest.mark.parametrize("architecture", ["llama", "qwen2moe"])
def test_queries_keys_and_values_in_one_tensor(tmp_path: Path, files: dict[str, Path], architecture: str) -> None:
    held = tensors_of(files[architecture])
    joined: dict[str, np.ndarray | None] = {}
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [f"blk.{layer}.attn_{matrix}.{kind}" for matrix in "qkv"]
            if parts[0] in held:
                joined |= {**dict.fromkeys(parts), f"blk.{layer}.attn_qkv.{kind}": np.concatenate([held[part] for part in parts])}
    whole, read = (
        GgufCheckpoint(files[architecture]),
        GgufCheckpoint(rewrite_gguf(files[architecture], tmp_path / "joined.gguf", tensors=joined)),
    )
    assert whole.names == read.names
    assert all(torch.equal(read.read(name).bfloat16(), whole.read(name).bfloat16()) for name in whole.names)


def split(path: Path, source: Path, count: int = 2) -> list[Path]:
    tensors = len(gguf.GGUFReader(source).tensors)
    rewrite_gguf(source, path, split_max_tensors=-(-tensors // count))
    return sorted(path.parent.glob(f"{path.stem}-*.gguf"))


def test_split_files_that_do_not_belong_together(tmp_path: Path, files: dict[str, Path]) -> None:
    parts = split(tmp_path / "a.gguf", files["qwen2moe"])
    assert GgufCheckpoint(parts[1]).files == parts
    others = split(tmp_path / "b.gguf", files["llama"])
    shutil.copy(others[1], tmp_path / "c-00002-of-00002.gguf")
    shutil.copy(parts[0], tmp_path / "c-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match="do not belong together"):
        GgufCheckpoint(tmp_path / "c-00001-of-00002.gguf")
    shutil.copy(parts[0], parts[1])
    with pytest.raises(CheckpointError, match="is part 1 of 2 and named as part 2 of 2"):
        GgufCheckpoint(parts[0])


def test_parts_under_other_names(tmp_path: Path, files: dict[str, Path]) -> None:
    part = split(tmp_path / "a.gguf", files["qwen2moe"])[0]
    with pytest.raises(CheckpointError, match=r"is part 1 of 2 and not named NAME-00001-of-00002\.gguf"):
        GgufCheckpoint(Path(shutil.copy(part, tmp_path / "model.gguf")))
    whole = Path(shutil.copy(files["qwen2moe"], tmp_path / "w-00001-of-00001.gguf"))
    assert GgufCheckpoint(whole).files == [whole]


def test_split_files_in_capitals(tmp_path: Path, files: dict[str, Path]) -> None:
    parts = split(tmp_path / "a.gguf", files["qwen2moe"])
    named = [part.rename(part.with_suffix(".GGUF")) for part in parts]
    assert GgufCheckpoint(named[0]).files == named


def test_one_matrix_of_two_models_is_noticed(tmp_path: Path, files: dict[str, Path]) -> None:
    parts = split(tmp_path / "a.gguf", files["qwen2moe"])
    fewer = rewrite_gguf(files["qwen2moe"], tmp_path / "fewer.gguf", tensors={"output.weight": None})
    other = split(tmp_path / "b.gguf", fewer)
    shutil.copy(other[1], parts[1])
    with pytest.raises(CheckpointError, match=r"both have|do not belong together"):
        GgufCheckpoint(parts[0])


def test_a_package_that_does_not_know_the_architecture(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {})
    with pytest.raises(ConfigError, match="does not know 'qwen2moe'; pip install -U"):
        GgufCheckpoint(files["qwen2moe"])


def test_a_tokenizer_that_is_nowhere_is_said(tmp_path: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    alone = rewrite_gguf(files["qwen2moe"], tmp_path / "m.gguf", put={"tokenizer.ggml.model": "of-tomorrow"})
    with caplog.at_level(logging.WARNING):
        store = convert(alone, tmp_path / "store")
    assert "no tokenizer: m.gguf has none that transformers" in caplog.text
    with pytest.raises(CheckpointError, match=r"store has no tokenizer: m.gguf has none that transformers .* reads \("):
        load_tokenizer(store)


def test_big_numbers_of_blocks_are_names_like_others(tmp_path: Path, files: dict[str, Path]) -> None:
    more: dict[str, Any] = {"blk.99999999999999999999.attn_norm.weight": np.ones(64, np.float32)}
    with pytest.raises(CheckpointError, match="has tensors of layer 99999999999999999999"):
        GgufCheckpoint(rewrite_gguf(files["qwen2moe"], tmp_path / "m.gguf", tensors=more))
