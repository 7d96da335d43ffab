"""Our safetensors code against the package: each reads what the other writes, and damaged files are refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from fate_moe.io.tensorfile import parse_header, place_tensors, read_header
from fate_moe.quant.dtypes import TORCH_DTYPES, dtype_name

tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "I64", "BOOL"]), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=6,
)


@given(tensors)
@settings(deadline=None, max_examples=50)
def test_the_package_reads_our_files(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    header, entries = place_tensors((name, dtype, shape) for name, (dtype, shape) in described.items())
    data = bytes(i % 2 for i in range(sum(entry.length for entry in entries)))
    path = tmp_path_factory.mktemp("written") / "file.safetensors"
    path.write_bytes(header + data)
    assert len(header) % 4096 == 0
    loaded = load_file(path)
    assert loaded.keys() == described.keys()
    for entry in entries:
        tensor = loaded[entry.name]
        assert (dtype_name(tensor.dtype), tuple(tensor.shape)) == described[entry.name] == (entry.dtype, entry.shape)
        bits = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        assert bytes(bits.tolist()) == (header + data)[entry.offset : entry.offset + entry.length]


@given(tensors)
@settings(deadline=None, max_examples=50)
def test_we_read_the_packages_files(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.mktemp("theirs") / "file.safetensors"
    made = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in described.items()}
    save_file(made, path, metadata={"format": "pt"})
    assert {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()} == described


def make_file(**changes: Any) -> bytes:
    """A file of two tensors with ``changes`` to its header."""
    entries: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
    }
    for name, change in changes.items():
        entries[name] = entries.get(name, {}) | change if isinstance(change, dict) else change
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + b"\1" * 11


ATTACKS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: b"\0" * 7,
    "only a length": lambda: (100).to_bytes(8, "little"),
    "header of nothing": lambda: (0).to_bytes(8, "little") + b"{}",
    "header longer than the file": lambda: (1 << 20).to_bytes(8, "little") + b"{}",
    "header of 2**63 bytes": lambda: (1 << 63).to_bytes(8, "little") + b"{}",
    "header no JSON": lambda: (3).to_bytes(8, "little") + b"{a}",
    "header a list": lambda: (2).to_bytes(8, "little") + b"[]",
    "header not UTF-8": lambda: (4).to_bytes(8, "little") + b'{"\xff}',
    "header nested deeply": lambda: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "hole at the start": lambda: make_file(a={"data_offsets": [1, 9]}),
    "hole in between": lambda: make_file(b={"data_offsets": [9, 12]}),
    "overlap": lambda: make_file(b={"data_offsets": [5, 8]}),
    "backwards": lambda: make_file(b={"data_offsets": [11, 8]}),
    "negative": lambda: make_file(b={"data_offsets": [-3, 0]}),
    "beyond the end": lambda: make_file(b={"shape": [300], "data_offsets": [8, 308]}),
    "bytes left over": lambda: make_file() + b"x",
    "cut": lambda: make_file()[:-1],
    "shape and length differ": lambda: make_file(a={"shape": [3]}),
    "shape of huge numbers": lambda: make_file(a={"shape": [1 << 62, 1 << 62]}),
    "shape negative": lambda: make_file(a={"shape": [-1, -2]}),
    "shape of fractions": lambda: make_file(a={"shape": [2.0]}),
    "shape of booleans": lambda: make_file(b={"shape": [True, 3]}),
    "shape missing": lambda: make_file(a=7),
    "offsets of three": lambda: make_file(a={"data_offsets": [0, 4, 8]}),
    "offsets a word": lambda: make_file(a={"data_offsets": "08"}),
    "pickle": lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(tmp_path: Path, name: str) -> None:
    path = tmp_path / "attack.safetensors"
    path.write_bytes(ATTACKS[name]())
    with pytest.raises((SafetensorError, OSError)), safe_open(path, "pt"):
        pass
    with pytest.raises(ValueError, match=r"safetensors|truncated|short") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_a_header_or_a_value_error(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_header(text, 8 + len(text))


@given(offset=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=200)
def test_a_flipped_bit_in_a_header(tmp_path_factory: pytest.TempPathFactory, offset: int, bit: int) -> None:
    """We accept no header that the package refuses, except for dtypes that only one of the two supports."""
    data = bytearray(save({"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}))
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    data[offset % header_bytes] ^= 1 << bit
    path = tmp_path_factory.mktemp("flipped") / "file.safetensors"
    path.write_bytes(data)
    try:
        ours = read_header(path)
    except ValueError:
        return
    if all(entry.dtype in TORCH_DTYPES for entry in ours.values()):
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == ours.keys()


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "absent")
