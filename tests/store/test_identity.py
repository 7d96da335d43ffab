"""One checkpoint has one store, wherever its files lie; what goes with the weights follows the checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fate_moe import demo
from fate_moe.checkpoints.gguf import open_checkpoint
from fate_moe.engine.prepare import plan, store_for
from fate_moe.errors import CheckpointError, StoreError
from fate_moe.io import digests
from fate_moe.store import identity
from fate_moe.store.convert import convert
from fate_moe.store.home import stores_home
from fate_moe.store.identity import StoreOptions, known_identity, older_identity, store_identity

OPTIONS = StoreOptions("lossless")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)  # files of this second are as good as others
    return tmp_path / "home"


@pytest.fixture
def source(home: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to edit, with a tokenizer."""
    shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / name, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose bytes were read for a digest."""
    names: list[str] = []
    make = digests.KnownDigests.make

    def noting(self: Any, file: Path, advance: Any) -> str:
        names.append(file.name)
        return make(self, file, advance)

    monkeypatch.setattr(digests.KnownDigests, "make", noting)
    return names


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def touched(source: Path) -> Path:
    os.utime(source / "model.safetensors")
    return source


def copied(source: Path) -> Path:
    return Path(shutil.copytree(source, source.with_name("copied"), copy_function=shutil.copy))


def moved(source: Path) -> Path:
    return source.rename(source.with_name("moved"))


def linked(source: Path) -> Path:
    return Path(shutil.copytree(source, source.with_name("linked"), copy_function=os.link))


def in_symlinks(source: Path) -> Path:
    """As the hub's cache has it."""
    snapshot = source.with_name("snapshot")
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    return snapshot


def reformatted(source: Path) -> Path:
    path = source / "config.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=8))
    return source


@pytest.mark.parametrize("happens", [touched, copied, moved, linked, in_symlinks, reformatted])
def test_a_checkpoint_that_is_the_same_has_one_store(source: Path, happens: Callable[[Path], Path]) -> None:
    store = store_for(source, "lossless")
    assert store_for(happens(source), "lossless") == store
    assert [path.name for path in stores_home().iterdir()] == [store.name]


def test_an_unchanged_checkpoint_is_read_once(source: Path, reads: list[str]) -> None:
    store = store_for(source, "lossless")
    assert reads == ["model.safetensors"]
    assert store_for(source, "lossless") == store_for(in_symlinks(source), "lossless") == store
    assert reads == ["model.safetensors"]


def test_weights_changed_in_place_with_the_old_time_make_another_store(source: Path) -> None:
    store, file = store_for(source, "lossless"), source / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert store_for(source, "lossless") != store


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"num_experts_per_tok": 3}, {"eos_token_id": 5}, {"transformers_version": "9"}]
)
def test_a_configuration_that_says_how_the_model_runs_is_taken_over(source: Path, change: dict[str, Any]) -> None:
    store = store_for(source, "lossless")
    edit(source / "config.json", **change)
    assert store_for(source, "lossless") == store
    assert json.loads((store / "config.json").read_text()).items() >= change.items()


def test_a_configuration_of_other_weights_is_another_store_or_refused(source: Path) -> None:
    store = store_for(source, "lossless")
    edit(source / "config.json", dtype="bfloat16")
    assert store_for(source, "lossless") != store
    for changes in ({"num_hidden_layers": 1}, {"num_hidden_layers": 2, "vocab_size": 64}):
        edit(source / "config.json", **changes)
        with pytest.raises(CheckpointError):
            store_for(source, "lossless")


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"])
def test_an_edited_companion_is_noticed(source: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    store = store_for(source, "lossless")
    caplog.clear()
    assert store_for(source, "lossless") == store
    assert not caplog.records
    (source / name).write_text('{"chat_template": "new"}')
    assert store_for(source, "lossless") == store
    assert (store / name).read_text() == '{"chat_template": "new"}'
    assert caplog.messages == [f"{store / name} is now the checkpoint's"]
    assert not list(store.glob("*.tmp"))


def test_a_store_that_is_given_is_not_compared(source: Path) -> None:
    store = store_for(source, "lossless")
    (source / "chat_template.jinja").write_text("new")
    assert store_for(store, "lossless") == store
    assert not (store / "chat_template.jinja").exists()


def test_a_stale_companion_that_cannot_be_replaced_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_for(source, "lossless")
    (source / "chat_template.jinja").write_text("new")
    (store / "chat_template.jinja").mkdir()  # stands in for a store on a read-only mount, which root would write to
    with pytest.raises(
        StoreError, match=r"chat_template.jinja differs from the checkpoint's and cannot be replaced .*; make .* writable"
    ):
        store_for(source, "lossless")


def test_a_store_of_an_earlier_version_is_still_found(source: Path, reads: list[str]) -> None:
    older = older_identity(open_checkpoint(source), OPTIONS)
    store = store_for(source, "lossless").rename(stores_home() / f"source-lossless-{older[:8]}")
    edit(store / "fate.json", identity=older)
    reads.clear()
    (stores_home().parent / "digests.json").unlink()
    assert store_for(source, "lossless") == store
    assert convert(source, store) == store
    assert not reads


def test_a_plan_reads_no_weights(source: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_QUICK_BYTES", 0)
    from_config = plan(source, ram="4GiB")
    assert not reads
    assert not stores_home().exists()
    store_for(source, "int4")
    reads.clear()
    assert plan(source, ram="4GiB").num_slots == from_config.num_slots
    assert not reads


def test_a_checkpoint_that_is_refused_is_not_read(source: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_QUICK_BYTES", 0)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        store_for(source, "lossless")
    assert not reads


def test_a_conversion_of_a_copy_goes_on_where_the_first_was_stopped(source: Path) -> None:
    store = store_for(source, "lossless")
    (store / "fate.json").unlink()
    begun = store.rename(store.with_name(store.name + ".partial"))
    assert store_for(copied(source), "lossless") == store
    assert not begun.exists()


def test_names_that_are_no_file_names_make_a_store(source: Path) -> None:
    for name in ("a" * 250, "new\nline", "bytes\udcff", ".hidden", "日本" * 40):
        place = source.with_name(name)
        source.rename(place)
        store = store_for(place, "lossless")
        assert len(os.fsencode(store.name)) < 150
        assert store.name.isprintable()
        assert not store.name.startswith(".")
        shutil.rmtree(store)
        place.rename(source)


def test_known_digests_survive_damage_and_stay_few(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, path = open_checkpoint(source), home / "digests.json"
    made = store_identity(checkpoint, OPTIONS)
    assert known_identity(checkpoint, OPTIONS) == made
    monkeypatch.setattr(identity, "_QUICK_BYTES", 0)
    for damaged in ("", "[]", '{"x": 3}', '{"x": [1, 2, 3]}', path.read_text()[:-5]):
        path.write_text(damaged)
        assert known_identity(checkpoint, OPTIONS) is None
        assert store_identity(checkpoint, OPTIONS) == made
    monkeypatch.setattr(digests, "_MOST_FILES", 3)
    for number in range(5):
        (home / f"{number}").write_bytes(b"x")
        digests_of = digests.KnownDigests(path)
        digests_of.make(home / f"{number}", lambda got: None)
        digests_of.save()
    assert [Path(name).name for name in json.loads(path.read_text())] == ["2", "3", "4"]


def test_a_home_that_keeps_no_digests_reads_each_time(source: Path, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "digests.json").mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        made = store_identity(open_checkpoint(source), OPTIONS)
    assert "cannot be kept" in caplog.text
    assert store_identity(open_checkpoint(source), OPTIONS) == made


def test_a_file_that_changed_just_now_is_not_trusted(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_QUICK_BYTES", 0)
    monkeypatch.setattr(digests, "_SETTLED_NS", 60_000_000_000)
    store_identity(open_checkpoint(source), OPTIONS)
    assert known_identity(open_checkpoint(source), OPTIONS) is None


def test_an_index_that_prefers_another_shard_makes_another_identity(source: Path) -> None:
    checkpoint, index, found = open_checkpoint(source), source / "model.safetensors.index.json", set()
    for shard in ("a", "b"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": f"{shard}.safetensors"}}))
        found.add(store_identity(checkpoint, OPTIONS))
    assert len(found) == 2
