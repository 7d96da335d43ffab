"""Conversion: a store holds the checkpoint's own bytes, whatever wrote the checkpoint and however it is split into files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fate_moe.core import SLOT_ALIGNMENT, ExpertId
from fate_moe.errors import CheckpointError, DiskSpaceError, StoreError, UnsupportedModelError
from fate_moe.io.direct import anonymous_buffer
from fate_moe.quant.blob import views
from fate_moe.quant.hqq import hqq
from fate_moe.store.convert import convert
from fate_moe.store.open import load_dense, open_store, verify
from fate_moe.store.reader import DiskSource
from tests.support.checkpoints import FAMILIES, tiny_checkpoint
from tests.support.reading import load_all, published_expert, same_bits, snapshot

DENSE_LAYERS = {"deepseek_v2": 1, "deepseek_v3": 1}  # before the first MoE layer


def read_parts(source: DiskSource, expert: ExpertId) -> dict[str, torch.Tensor]:
    layout = source.store.manifest.layout_of(expert)
    buffer = anonymous_buffer(layout.length)
    assert source.read(expert, memoryview(buffer)) == layout.length
    return views(layout, torch.frombuffer(buffer, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_is_the_checkpoints_own_bytes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, tmp_path / "checkpoint", dtype)
    published = load_all(folder)
    store = open_store(convert(folder, tmp_path / "store"))
    verify(store)
    source = DiskSource(store)
    for layer in range(store.manifest.num_layers):
        for expert in range(8):
            expected = published_expert(published, family, layer + DENSE_LAYERS.get(family, 0), expert)
            parts = read_parts(source, ExpertId(layer, expert))
            assert parts.keys() == expected.keys()
            for name, tensor in expected.items():
                assert same_bits(parts[name], tensor), f"{name} of layer {layer} expert {expert}"
    source.close()
    dense = load_dense(store)
    others = {name: tensor for name, tensor in published.items() if ".experts." not in name}
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in others.items()}
    assert dense.keys() == renamed.keys()
    for name, tensor in renamed.items():
        assert torch.equal(dense[name], tensor), name
        # transformers keeps a few in fp32 (DeepSeek-V3's e_score_correction_bias); no tensor gets a narrower dtype
        assert dense[name].dtype == torch.promote_types(tensor.dtype, dense[name].dtype)


@pytest.mark.parametrize("precision", ["lossless", "int4"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
def test_shards_are_plain_safetensors_with_aligned_blobs(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, precision: str
) -> None:
    store = open_store(convert(checkpoint(family), tmp_path / "store", precision))
    manifest = store.manifest
    slot = anonymous_buffer(manifest.slot_bytes)
    source = DiskSource(store)
    for number, layer in enumerate(manifest.layers):
        length = manifest.layouts_of(number)[0].length
        tensors = load_file(store.path / layer.shard)
        assert tensors.keys() == {f"{layer.name}.{index}" for index in range(8)}
        assert length % SLOT_ALIGNMENT == 0
        data = (store.path / layer.shard).read_bytes()
        for index, entry in enumerate(layer.experts):
            assert entry.offset % SLOT_ALIGNMENT == 0
            source.read(ExpertId(number, index), memoryview(slot))
            blob = bytes(slot[:length])
            assert blob == data[entry.offset : entry.offset + length]
            assert blob == bytes(tensors[f"{layer.name}.{index}"].numpy())
    source.close()
    dense = load_file(store.path / "dense.safetensors")
    assert all(torch.equal(tensor, dense[name]) for name, tensor in load_dense(store).items())


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_int4_is_the_solver_applied_to_the_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    published = load_all(checkpoint(family))
    source = DiskSource(open_store(convert(checkpoint(family), tmp_path / "store", "int4")))
    for expert in (0, 7):
        parts = read_parts(source, ExpertId(1, expert))
        for name, tensor in published_expert(published, family, 1 + DENSE_LAYERS.get(family, 0), expert).items():
            if tensor.ndim == 1:
                assert same_bits(parts[name], tensor)
                continue
            _, scale, zero = hqq(tensor.float(), 4, 64)
            assert same_bits(parts[f"{name}.scale"], scale)
            assert same_bits(parts[f"{name}.zero"], zero)
    source.close()


def test_single_and_sharded_sources_make_the_same_store(tmp_path: Path) -> None:
    single = tiny_checkpoint("qwen3_moe", tmp_path / "single")
    sharded = tiny_checkpoint("qwen3_moe", tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 5
    assert not (sharded / "model.safetensors").exists()
    one, many = (snapshot(convert(folder, tmp_path / f"{folder.name}-store")) for folder in (single, sharded))
    assert one.keys() == many.keys()
    for name in one.keys() - {"fate.json"}:
        assert one[name] == many[name], name
    facts = [json.loads(files["fate.json"]) for files in (one, many)]
    assert [made.pop("source") for made in facts] == ["single", "sharded"]
    assert facts[0].pop("identity") != facts[1].pop("identity")
    assert facts[0] == facts[1]


def test_experts_of_a_layer_in_other_files_and_another_order(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Experts 0, 1, 10, 11 ... must not be sorted as text; 12 experts, each in its own file."""
    folder = tiny_checkpoint("qwen2_moe", tmp_path / "one", num_experts=12)
    tensors = load_file(folder / "model.safetensors")
    scattered = tmp_path / "scattered"
    scattered.mkdir()
    (scattered / "config.json").write_bytes((folder / "config.json").read_bytes())
    weight_map = {}
    for name in reversed(tensors):
        shard = f"part-{name.split('.experts.')[1].split('.')[0] if '.experts.' in name else 'rest'}.safetensors"
        weight_map[name] = shard
    for shard in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}, scattered / shard)
    (scattered / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    stores = [snapshot(convert(source, tmp_path / f"{source.name}-store")) for source in (folder, scattered)]
    assert all(stores[0][name] == stores[1][name] for name in stores[0] if name.startswith(("dense", "experts")))


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2_moe", tmp_path / "tied", tie_word_embeddings=True)
    dense = load_dense(open_store(convert(folder, tmp_path / "store")))
    assert "lm_head.weight" not in dense
    assert "model.embed_tokens.weight" in dense


def test_a_complete_store_is_left_unchanged_and_another_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = convert(checkpoint("olmoe"), tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    assert convert(checkpoint("olmoe"), store) == store
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == before
    with pytest.raises(StoreError, match="not a complete store of this checkpoint"):
        convert(checkpoint("mixtral"), store)
    with pytest.raises(StoreError, match="not a complete store of this checkpoint"):
        convert(checkpoint("olmoe"), store, "int4")
    with pytest.raises(CheckpointError, match="already an expert store"):
        convert(store, tmp_path / "again")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="not a complete store"):
        convert(checkpoint("olmoe"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_may_be_the_destination(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    open_store(convert(checkpoint("olmoe"), tmp_path / "store"))


def test_too_little_disk_space_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail = 10
        f_frsize = 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(DiskSpaceError, match=r"needs .* and 40 KiB are free"):
        convert(checkpoint("olmoe"), tmp_path / "stores" / "store")
    assert not list((tmp_path / "stores").iterdir())
    monkeypatch.undo()
    open_store(convert(checkpoint("olmoe"), tmp_path / "stores" / "store"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "lacks 1 of the 8 experts"),
        (
            lambda tensors: [tensors.pop(k) for k in list(tensors) if "layers.0.mlp.experts" in k],
            "lacks model.layers.0.mlp.experts",
        ),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight has shape"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(5, 5)}),
            "model.layers.1.mlp.experts",
        ),
        (lambda tensors: tensors.update({"model.layers.0.x.qweight": torch.zeros(5, dtype=torch.int32)}), "quantized"),
    ],
)
def test_checkpoints_that_lack_something(
    checkpoint: Callable[[str], Path], tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint("qwen2_moe") / "config.json").read_bytes())
    tensors = load_all(checkpoint("qwen2_moe"))
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(folder, tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("precision", ["lossless", "int4"])
def test_infinite_weights_of_an_expert_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint("qwen2_moe") / "config.json").read_bytes())
    tensors = load_all(checkpoint("qwen2_moe"))
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.*expert 3 has infinite or NaN weights"):
        convert(folder, tmp_path / "store", precision)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_pickled_and_unsupported_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        convert(folder, tmp_path / "store")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickled"):
        convert(folder, tmp_path / "store")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    for config, error in (
        ("{cut", CheckpointError),
        ('{"model_type": "mixtral", "quantization_config": {"quant_method": "gptq"}}', UnsupportedModelError),
        ('{"model_type": "llama"}', UnsupportedModelError),
        ('{"model_type": "never-heard-of", "auto_map": {}}', UnsupportedModelError),
        ("[]", CheckpointError),
    ):
        (folder / "config.json").write_text(config)
        with pytest.raises(error) as caught:
            convert(folder, tmp_path / "store")
        assert "\n" not in str(caught.value)
