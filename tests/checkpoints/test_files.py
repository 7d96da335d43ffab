"""Which file of a folder holds which tensor: the index decides; what contradicts it is refused with a remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fate_moe.checkpoints.files import find_weights
from fate_moe.cli import main
from fate_moe.errors import CheckpointError
from fate_moe.store.convert import convert
from fate_moe.store.open import load_dense, open_store
from fate_moe.store.plan import describe_model
from tests.support.altered import change_tensors, edit_json, plan_of
from tests.support.checkpoints import tiny_checkpoint
from tests.support.reading import load_all

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards with an index."""
    return tiny_checkpoint("qwen2_moe", tmp_path_factory.mktemp("files") / "shards", max_shard_size="60KB")


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "folder"))


def weight_map(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def set_map(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    edit_json(folder / INDEX, lambda data: change(data["weight_map"]))


def others(folder: Path) -> list[str]:
    """The shards that do not hold the last norm, first and last of them."""
    names = sorted(set(weight_map(folder).values()) - {weight_map(folder)[NORM]})
    return [names[0], names[-1]]


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        plan_of(folder)
    assert "\n" not in str(caught.value)


def add(folder: Path, file: str, **tensors: torch.Tensor) -> None:
    change_tensors(folder / file, lambda there: there.update({name.replace("__", "."): tensor for name, tensor in tensors.items()}))


@pytest.mark.parametrize("which", [0, 1], ids=["before", "after"])
def test_the_index_decides_which_copy_counts(folder: Path, tmp_path: Path, which: int) -> None:
    """A stale copy in an earlier and in a later shard."""
    wanted = load_all(folder)[NORM]
    stale = others(folder)[which]
    add(folder, stale, model__norm__weight=torch.full((64,), 7.0))
    assert torch.equal(load_dense(open_store(convert(folder, tmp_path / "store")))[NORM], wanted)
    ((name, reason),) = plan_of(folder).unread.items()
    assert name == f"{stale}: {NORM}"
    assert reason == f"superseded: {INDEX} places it in {weight_map(folder)[NORM]}"


def test_two_copies_of_which_the_index_says_nothing(folder: Path) -> None:
    add(folder, others(folder)[0], model__norm__weight=torch.zeros(64))
    set_map(folder, lambda names: names.pop(NORM))
    refused(folder, f"{NORM} is in .* and in .*, and {INDEX} does not list it")


def test_an_index_that_omits_a_tensor_of_a_listed_shard(folder: Path) -> None:
    set_map(folder, lambda names: names.pop(NORM))
    assert NORM in plan_of(folder).recipes


def test_an_index_that_omits_a_needed_shard(folder: Path) -> None:
    last = weight_map(folder)[NORM]
    set_map(folder, lambda names: [names.pop(name) for name, file in list(names.items()) if file == last])
    refused(folder, f"lacks .* it is in {last}, a file that {INDEX} does not list; fetch the index again, or delete it")


def test_an_index_that_names_the_wrong_shard(folder: Path) -> None:
    set_map(folder, lambda names: names.update({NORM: others(folder)[0]}))
    refused(folder, f"{NORM} is not in .*, where it should be, but in")


def test_a_tensor_that_the_index_names_and_no_shard_has(folder: Path) -> None:
    change_tensors(folder / weight_map(folder)[NORM], lambda tensors: tensors.pop(NORM))
    refused(folder, f"lacks {NORM}, .* which does not have it; fetch both again")


def test_a_tensor_that_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    """lm_head.weight, left out of the shards because it is tied, but not of the index."""
    folder = tiny_checkpoint("qwen2_moe", tmp_path / "tied", max_shard_size="60KB", tie_word_embeddings=True)
    set_map(folder, lambda names: names.update({"lm_head.weight": names[NORM]}))
    plan_of(folder)


def test_a_shard_that_the_index_does_not_list_is_named(folder: Path) -> None:
    save_file({"mtp.fc.weight": torch.zeros(2)}, folder / "model-mtp.safetensors")
    assert plan_of(folder).unread == {"model-mtp.safetensors: mtp.fc.weight": f"in a file that {INDEX} does not list"}


def test_shards_in_a_subfolder(folder: Path) -> None:
    (folder / "weights").mkdir()
    for file in set(weight_map(folder).values()):
        (folder / file).rename(folder / "weights" / file)
    set_map(folder, lambda names: names.update({name: f"weights/{file}" for name, file in names.items()}))
    plan_of(folder)
    edit_json(folder / "config.json", lambda data: data.update(num_hidden_layers=3, layer_types=["full_attention"] * 3))
    with pytest.raises(CheckpointError, match="describes 3"):  # so it is not planned from config.json alone
        describe_model(folder)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "", "a/../../x", None, 3])
def test_an_index_that_leaves_the_folder(folder: Path, file: Any) -> None:
    set_map(folder, lambda names: names.update({NORM: file}))
    refused(folder, "which is not a file of this folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {}}', "lists no tensors; fetch it again, or delete it"),
        ("{}", "it has no weight_map"),
        ("[]", "it has no weight_map"),
        ('{"weight_map": {"a": "b",}}', "line 1, column 26: a comma before a closing bracket; delete the comma"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer instead of the file; run git lfs pull"),
    ],
)
def test_an_index_that_says_nothing(folder: Path, content: str, message: str) -> None:
    (folder / INDEX).write_text(content)
    refused(folder, message)


def test_an_index_with_a_byte_order_mark(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\xef\xbb\xbf" + (folder / INDEX).read_bytes())
    plan_of(folder)


def test_an_index_of_files_that_have_other_names(folder: Path) -> None:
    set_map(folder, lambda names: names.update({name: file.replace("-of-", "-of-9") for name, file in names.items()}))
    refused(folder, r"is missing.*\(\d+ of \d+ files are missing\); the folder has .* instead: .* delete the index")


def test_a_missing_shard(folder: Path) -> None:
    (folder / others(folder)[0]).unlink()
    refused(folder, rf"{others(folder)[0]} is missing, .*\(1 of \d+ files are missing\); fetch what is missing")


def test_shards_without_an_index(folder: Path, shards: Path) -> None:
    (folder / INDEX).unlink()
    assert find_weights(folder).entries.keys() == find_weights(shards).entries.keys()
    (folder / others(shards)[0]).unlink()
    refused(folder, r"number \d+ is missing, fetch the rest")


def test_two_sets_of_shards_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file(load_all(folder), folder / "old-00001-of-00001.safetensors")
    refused(folder, "and no index says which counts; move the older file away")


def test_one_file_of_another_name(folder: Path) -> None:
    tensors = load_all(folder)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "weights.fp32.safetensors")
    plan_of(folder)


def test_one_file_beside_shards_is_ambiguous(folder: Path) -> None:
    save_file(load_all(folder), folder / SINGLE)
    refused(folder, "has model.safetensors and also shards .*; move the older of the two away")


def test_one_file_beside_the_index_of_shards_that_are_gone(folder: Path) -> None:
    tensors = load_all(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(tensors, folder / SINGLE)
    assert not plan_of(folder).unread


def test_mistrals_own_file_beside_shards_is_named(folder: Path) -> None:
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert plan_of(folder).unread == {"consolidated.safetensors: layers.0.attention.wq.weight": "in a file of another format"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-Q4_K_M.gguf", "a.txt"], r"has no safetensors but GGUF; give the file itself: .*model-Q4_K_M\.gguf"),
        (["pytorch_model.bin"], "only pickled weights"),
        (["consolidated.safetensors"], r"only consolidated\.safetensors, in Mistral's own format"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter .* merge it into its base model"),
        (["snapshots/0123/config.json", "refs/main"], r"holds no weights, but .*snapshots/0123 is a checkpoint; give that folder"),
        (["model.onnx"], r"neither model\.safetensors nor .*; it has model\.onnx"),
        ([], "the folder is empty"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=message):
        find_weights(tmp_path)


def test_a_store_that_lost_its_manifest(folder: Path, tmp_path: Path) -> None:
    store = convert(folder, tmp_path / "store")
    (store / "fate.json").unlink()
    refused(store, r"is an expert store without its fate\.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page instead of the file"),
        (b"Entry not found", "is damaged .*fetch this file again"),
    ],
)
def test_what_stands_in_the_place_of_a_shard(folder: Path, content: bytes, message: str) -> None:
    (folder / others(folder)[0]).write_bytes(content)
    refused(folder, message)


def test_a_pointer_in_the_place_of_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a Git LFS pointer"):
        convert(folder, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_a_file_of_a_checkpoint_is_given_instead_of_its_folder(folder: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder / file)]) == 1
    assert f"is one file of a checkpoint; give its folder: {folder}" in capsys.readouterr().err


def test_config_json_and_companions_with_byte_order_marks(folder: Path, tmp_path: Path) -> None:
    """UTF-8 and UTF-16, as editors on Windows write them; the store has neither mark, since other readers refuse them."""
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_bytes(text.encode("utf-16"))
    (folder / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": 0}')
    store = convert(folder, tmp_path / "store")
    assert (store / "config.json").read_text() == text
    assert (store / "generation_config.json").read_bytes() == b'{"eos_token_id": 0}'


def test_a_companion_that_is_no_json_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, // stop\n"top_k": 1}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not .* line 1, column 21: JSON has no comments"):
        convert(folder, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_weights_without_config_json(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, r"has no config\.json; give the folder of a Hugging Face checkpoint")
