"""A folder of broken stores: each is refused in one clear line that names the file, and nothing wrong is ever computed from one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe.cli import main
from fate_moe.engine.prepare import prepare
from fate_moe.errors import StoreError
from fate_moe.store.convert import convert
from fate_moe.store.format import Manifest
from fate_moe.store.open import load_dense, open_store, verify

FIRST, SECOND = "experts-00001-of-00002.safetensors", "experts-00002-of-00002.safetensors"
HUGE = (1 << 63) - 4096

Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete int4 store that `fate run` could run; its tokenizer has two words."""
    store = convert(checkpoint("mixtral"), tmp_path_factory.mktemp("good") / "store", "int4")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 1, "y": 2}, unk_token="y"))
    words.save(str(store / "tokenizer.json"))
    (store / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "y"}')
    return store


@pytest.fixture
def store(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "store"))


def flip(name: str, offset: int) -> Break:
    def flipped(store: Path) -> None:
        data = bytearray((store / name).read_bytes())
        data[offset] ^= 0x10
        (store / name).write_bytes(data)

    return flipped


def cut(name: str, fraction: float) -> Break:
    return lambda store: os.truncate(store / name, int((store / name).stat().st_size * fraction))


def grow(name: str) -> Break:
    return lambda store: (store / name).write_bytes((store / name).read_bytes() + b"\0" * 4096)


def write(name: str, data: bytes) -> Break:
    return lambda store: (store / name).write_bytes(data)


def replace(name: str, make: Callable[[int], bytes]) -> Break:
    """Other contents of the same length."""
    return lambda store: (store / name).write_bytes(make((store / name).stat().st_size))


def edit(*path: str | int, to: Any = None, change: Callable[[Any], Any] | None = None) -> Break:
    """Change one entry of fate.json."""

    def edited(store: Path) -> None:
        data = json.loads((store / "fate.json").read_bytes())
        owner = data
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = change(owner[path[-1]]) if change else to
        (store / "fate.json").write_text(json.dumps(data))

    return edited


def folder_instead(name: str) -> Break:
    def replaced(store: Path) -> None:
        (store / name).unlink()
        (store / name).mkdir()

    return replaced


def instead(name: str, make: Callable[[Path], object]) -> Break:
    def replaced(store: Path) -> None:
        (store / name).unlink()
        make(store / name)

    return replaced


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Break:
    return lambda store: (store / name).write_bytes(change((store / name).read_bytes()))


def odd_dtype(store: Path) -> None:
    """A name of the same length, so that all else is in its place."""
    data = (store / "dense.safetensors").read_bytes()
    (store / "dense.safetensors").write_bytes(data.replace(b'"F32"', b'"I3Z"', 1))


def swap_shards(store: Path) -> None:
    (store / FIRST).rename(store / "x")
    (store / SECOND).rename(store / FIRST)
    (store / "x").rename(store / SECOND)


def rename_shard(to: str) -> Break:
    """A name in fate.json that leads elsewhere, consistently; the file is there, so that only the name is wrong."""

    def renamed(store: Path) -> None:
        target = store / to
        if target.parent.is_dir() and len(to) < 200 and not target.exists():
            shutil.copy(store / FIRST, target)
        (store / "fate.json").write_text((store / "fate.json").read_text().replace(FIRST, to))

    return renamed


def swap_parts(store: Path) -> None:
    """Scales and zeros exchanged: the same sizes, but other numbers."""
    text = (store / "fate.json").read_text()
    text = text.replace("down_proj.scale", "\0").replace("down_proj.zero", "down_proj.scale").replace("\0", "down_proj.zero")
    (store / "fate.json").write_text(text)


def other_header(store: Path) -> None:
    """A shard whose header moves two experts, which fate.json does not know."""
    data = (store / FIRST).read_bytes()
    data = data.replace(b'experts.0"', b'experts.X"').replace(b'experts.1"', b'experts.0"').replace(b'experts.X"', b'experts.1"')
    (store / FIRST).write_bytes(data)


def alter_config(**changes: Any) -> Break:
    return lambda store: (store / "config.json").write_text(json.dumps(json.loads((store / "config.json").read_text()) | changes))


# How the store is damaged, and what the error line must contain; it must also name the store's folder.
BROKEN: dict[str, tuple[Break, str]] = {
    "fate.json empty": (write("fate.json", b""), "fate.json is damaged"),
    "fate.json truncated": (cut("fate.json", 0.7), "fate.json is damaged"),
    "fate.json not text": (write("fate.json", b"\xff\xfe\0\0"), "fate.json is damaged"),
    "fate.json not UTF-8": (edit_bytes("fate.json", lambda data: data.replace(b"mixtral", b"mix\xffral", 1)), "no text at byte"),
    "fate.json without end": (lambda s: os.truncate(s / "fate.json", 1 << 36), "at most"),
    "fate.json a pipe": (instead("fate.json", os.mkfifo), "is a pipe or a device"),
    "fate.json a list": (write("fate.json", b"[]"), "fate.json is damaged"),
    "fate.json nested deeply": (write("fate.json", b"[" * 100_000), "fate.json is damaged"),
    "fate.json without a version": (write("fate.json", b"{}"), "fate.json is damaged"),
    "fate.json a folder": (folder_instead("fate.json"), "fate.json cannot be read"),
    "version of the future": (edit("format_version", to=2), "update fate-moe"),
    "version of the past": (edit("format_version", to=0), "convert the checkpoint again"),
    "version a string": (edit("format_version", to="1"), "fate.json is damaged"),
    "version true": (edit("format_version", to=True), "fate.json is damaged"),
    "unknown entry": (edit("encrypted", to=True), "unknown entries ['encrypted']"),
    "precision unknown": (edit("precision", to="int3"), "precision 'int3'"),
    "precision of others": (edit("precision", to="lossless"), "layouts of another precision"),
    "dtype unknown": (edit("dtype", to="F8_E4M3"), "dtype 'F8_E4M3'"),
    "no layers": (edit("layers", to=[]), "no layers"),
    "no layouts": (edit("layouts", to=[]), "fate.json is damaged"),
    "layers twice": (edit("layers", change=lambda layers: [layers[0], layers[0]]), "two layers of one name"),
    "shard length wrong": (edit("shard_bytes", FIRST, change=lambda n: n + 4096), f"{FIRST} has"),
    "shard length negative": (edit("shard_bytes", FIRST, to=-4096), "is not a count"),
    "shard length huge": (edit("shard_bytes", FIRST, to=HUGE), f"{FIRST} has"),
    "shard length beyond 64 bits": (edit("shard_bytes", FIRST, to=1 << 70), "is not a count"),
    "shard length a fraction": (edit("shard_bytes", FIRST, change=float), "is not a count"),
    "shard unnamed": (edit("shard_bytes", change=lambda d: {FIRST: d[FIRST]}), "fate.json is damaged"),
    "dense length wrong": (edit("dense_bytes", change=lambda n: n - 1), "dense.safetensors has"),
    "blob length wrong": (edit("layouts", 0, "length", change=lambda n: n - 4096), "fate.json is damaged"),
    "blob length zero": (edit("layouts", 0, "length", to=0), "blob length 0"),
    "blob length huge": (edit("layouts", 0, "length", to=HUGE), "ends outside"),
    "blob length unaligned": (edit("layouts", 0, "length", change=lambda n: n + 1), "blob length"),
    "section beyond the blob": (edit("layouts", 0, "sections", 3, 2, change=lambda n: n + (1 << 20)), "sections of"),
    "section with a hole": (edit("layouts", 0, "sections", 1, 1, change=lambda n: n + 64), "section plane0 at"),
    "part outside": (edit("layouts", 0, "parts", 0, 2, to=[1 << 20, 1 << 20]), "fate.json is damaged"),
    "part with a negative size": (edit("layouts", 0, "parts", 0, 2, to=[-1, 2]), "is not a count"),
    "part of no dtype": (edit("layouts", 0, "parts", 0, 1, to="F13"), "dtype 'F13'"),
    "part of a thousand dimensions": (edit("layouts", 0, "parts", 0, 2, to=[1 << 60] * 50_000), "of 50000 dimensions"),
    "parts overlap": (edit("layouts", 0, "parts", 1, 3, to=0), "fate.json is damaged"),
    "groups of nothing": (edit("layouts", 0, "group_size", to=0), "groups of 0"),
    "planes of 3 bits": (edit("layouts", 0, "plane_widths", to=[3, 1]), "planes of"),
    "layout index beyond": (edit("layers", 0, "layout", to=9), "fate.json is damaged"),
    "layout index negative": (edit("layers", 0, "layout", to=-1), "fate.json is damaged"),
    "expert elsewhere": (edit("layers", 0, "experts", 0, 0, change=lambda n: n + 4096), "fate.json is damaged"),
    "expert unaligned": (edit("layers", 0, "experts", 7, 0, change=lambda n: n + 64), "expert 7 at"),
    "expert at 0": (edit("layers", 0, "experts", 0, 0, to=0), "expert 0 at 0"),
    "expert beyond the shard": (edit("layers", 0, "experts", 7, 0, to=HUGE), "ends outside"),
    "experts exchanged": (edit("layers", 0, "experts", change=lambda e: [e[1], e[0], *e[2:]]), "expert 0 is not where"),
    "expert without checksums": (edit("layers", 0, "experts", 3, change=lambda e: e[:2]), "1 checksums instead of 4"),
    "checksum malformed": (edit("layers", 0, "experts", 3, 1, to="zz"), "is not a checksum"),
    "traversal": (rename_shard("../escape.safetensors"), "is not the file name of a shard"),
    "absolute path": (rename_shard("/etc/passwd"), "is not the file name of a shard"),
    "traversal without an end": (rename_shard(".."), "is not the file name of a shard"),
    "hidden file": (rename_shard(".hidden.safetensors"), "is not the file name of a shard"),
    "file name with a zero byte": (rename_shard("a\\u0000b.safetensors"), "is not the file name of a shard"),
    "file name with a line break": (rename_shard("a.safetensors\\n"), "is not the file name of a shard"),
    "file name without end": (rename_shard("a" * 300 + ".safetensors"), "cannot be read"),
    "shard missing": (lambda s: (s / SECOND).unlink(), f"{SECOND} cannot be read"),
    "shard a folder": (folder_instead(SECOND), SECOND),
    "shard a link elsewhere": (instead(FIRST, lambda path: path.symlink_to("/etc/passwd")), "is a link that leaves the store"),
    "a link to nothing beside": (lambda s: (s / "last-used").symlink_to("../elsewhere"), "is a link that leaves the store"),
    "shard empty": (write(FIRST, b""), f"{FIRST} has 0 bytes"),
    "shard truncated": (cut(FIRST, 0.5), f"{FIRST} has"),
    "shard too long": (grow(FIRST), f"{FIRST} has"),
    "shard not safetensors": (replace(FIRST, lambda n: b"PK\3\4" * (n // 4)), f"{FIRST} is damaged (not a safetensors file"),
    "shard all zeros": (replace(FIRST, bytes), f"{FIRST} is damaged"),
    "shard a pickle": (replace(FIRST, lambda n: b"\x80\x04cos\nsystem\n".ljust(n, b".")), f"{FIRST} is damaged"),
    "shard with a header without end": (
        replace(FIRST, lambda n: (n * 2).to_bytes(8, "little").ljust(n, b" ")),
        f"{FIRST} is damaged (truncated",
    ),
    "shard's header flipped": (flip(FIRST, 9), f"{FIRST} is damaged"),
    "shard's header moves experts": (other_header, "expert 0 is not where"),
    "shards exchanged": (swap_shards, "is not where fate.json says"),
    "dense missing": (lambda s: (s / "dense.safetensors").unlink(), "dense.safetensors cannot be read"),
    "dense truncated": (cut("dense.safetensors", 0.9), "dense.safetensors has"),
    "dense of no dtype": (odd_dtype, "has the dtype 'I3Z'"),
    "dense not safetensors": (replace("dense.safetensors", bytes), "dense.safetensors is damaged"),
    "config.json missing": (lambda s: (s / "config.json").unlink(), "config.json is missing"),
}
# Damage that opening a store cannot detect; running must, before it computes anything.
BROKEN_TO_RUN: dict[str, tuple[Break, str]] = {
    "expert missing": (edit("layers", 0, "experts", change=lambda e: e[:-1]), "fate.json lists other expert layers"),
    "parts exchanged": (swap_parts, "in another way than this model needs"),
    "other groups": (edit("layouts", 0, "group_size", to=32), "in another way than this model needs"),
    "other planes": (edit("layouts", 0, "plane_widths", to=[1, 1, 2]), "in another way than this model needs"),
    "config.json truncated": (cut("config.json", 0.5), "config.json is not valid JSON"),
    "config.json empty": (write("config.json", b""), "config.json is empty"),
    "config.json of a list": (write("config.json", b"[1]"), "config.json"),
    "config.json of another family": (alter_config(model_type="olmoe"), "config.json"),
    "config.json with more layers": (alter_config(num_hidden_layers=3), "other expert layers"),
    "config.json with wider experts": (alter_config(intermediate_size=64), "in another way"),
    "config.json of nonsense": (alter_config(hidden_size="wide"), "config.json"),
    "config.json with fewer words": (alter_config(vocab_size=64), "is (128, 64) in dense.safetensors, config.json means (64, 64)"),
    "generation_config.json truncated": (
        write("generation_config.json", b'{"eos_token_id": '),
        "generation_config.json cannot be read",
    ),
    "tokenizer truncated": (cut("tokenizer.json", 0.5), "its tokenizer cannot be loaded"),
}


def one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if ": budget " not in line]  # the plan, if it was printed
    assert line.startswith("fate: ")
    assert message in line
    assert str(arguments[1]) in line


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_store_is_refused_in_one_line(store: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, message = BROKEN[name]
    break_it(store)
    one_line(["run", str(store), "x"], message, capsys)
    one_line(["plan", str(store)], message, capsys)
    one_line(["inspect", str(store)], message, capsys)
    with pytest.raises(StoreError) as caught:
        open_store(store)
    assert len(str(caught.value)) < 1000, "a line, not the file"


@pytest.mark.parametrize("name", BROKEN_TO_RUN)
def test_a_store_that_does_not_fit_its_model_is_refused(store: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, message = BROKEN_TO_RUN[name]
    break_it(store)
    one_line(["run", str(store), "x"], message, capsys)


def test_the_good_store_is_good(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without this, the tests above would prove nothing."""
    prepare(store)
    assert main(["inspect", str(store), "--verify"]) == 0
    assert main(["plan", str(store)]) == 0
    assert capsys.readouterr().err == ""


def test_links_within_a_store_and_in_the_hubs_cache_are_followed(good: Path, tmp_path: Path) -> None:
    """A snapshot there holds links to the blobs beside it; one to anywhere else is refused there too."""
    repository, blobs = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "models--a--b" / "blobs"
    repository.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(good.iterdir())):
        shutil.copy(file, blobs / str(number))
        (repository / file.name).symlink_to(f"../../blobs/{number}")
    verify(open_store(repository))
    (repository / "other.json").symlink_to(repository / "config.json")
    verify(open_store(repository))
    (repository / "more.json").symlink_to(good / "config.json")
    with pytest.raises(StoreError, match="leaves the store"):
        open_store(repository)


def test_no_store_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(["inspect", str(tmp_path)], "not an expert store (no fate.json)", capsys)
    one_line(["run", str(tmp_path), "x"], "neither model.safetensors nor", capsys)


def test_flipped_bytes_anywhere_are_found_by_verify(good: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One in each section of the first and the last expert of each layer, and over all of dense.safetensors."""
    manifest = open_store(good).manifest
    places = [(shard, e, s) for shard in (0, 1) for e in (0, 7) for s in manifest.layouts_of(shard)[0].sections]
    for layer, expert, section in places:
        shard, entry = manifest.layers[layer].shard, manifest.layers[layer].experts[expert]
        flip(shard, entry.offset + section.offset + section.length // 3)(store)
        message = f"{shard}: layer {layer} expert {expert}: section {section.name} differs"
        one_line(["inspect", str(store), "--verify"], message, capsys)
        shutil.copy(good / shard, store / shard)
    start = int.from_bytes((good / "dense.safetensors").read_bytes()[:8], "little") + 8
    for offset in range(start, manifest.dense_bytes, manifest.dense_bytes // 7):
        flip("dense.safetensors", offset)(store)
        one_line(["inspect", str(store), "--verify"], "dense.safetensors: its bytes differ from their checksum", capsys)
        with pytest.raises(StoreError, match="differ from their checksum"):
            load_dense(open_store(store))
        shutil.copy(good / "dense.safetensors", store / "dense.safetensors")
    verify(open_store(store))


@given(offset=st.integers(0, 10**9), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=150)
def test_a_flipped_bit_in_fate_json_changes_nothing_that_is_computed(good: Path, scratch: Path, offset: int, bit: int) -> None:
    """It is refused by opening, preparing or a checksum, or it is in an entry that nothing depends on."""
    text = bytearray((good / "fate.json").read_bytes())
    text[offset % len(text)] ^= 1 << bit
    (scratch / "fate.json").write_bytes(text)
    if (line := refusal(lambda: verify(prepare(scratch).store))) is None:
        remarks: dict[str, Any] = {
            "source": "",
            "family": "",
            "identity": "",
            "dtype": "F32",
        }  # int4 experts without biases have nothing in it
        assert dataclasses.replace(open_store(scratch).manifest, **remarks) == dataclasses.replace(
            open_store(good).manifest, **remarks
        )
    else:
        assert "\n" not in line


def refusal(action: Callable[[], object]) -> str | None:
    """The message of the StoreError that ``action`` raises; None if it raises none."""
    try:
        action()
    except StoreError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def scratch(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("scratch") / "store"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_any_other_value_anywhere_in_fate_json(good: Path, data: st.DataObject) -> None:
    """Any value in any place gives a manifest or a StoreError of one line, never another exception."""
    tree: Any = json.loads((good / "fate.json").read_bytes())
    owner, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(owner[key], list | dict) and owner[key] and data.draw(st.integers(0, 3)):
        owner = owner[key]
        key = data.draw(st.sampled_from(sorted(owner)) if isinstance(owner, dict) else st.integers(0, len(owner) - 1))
    owner[key] = data.draw(JSON)
    assert "\n" not in (refusal(lambda: Manifest.from_json(json.dumps(tree), "fate.json")) or "")
