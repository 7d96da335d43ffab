"""Headers of GGUF files that are not what they seem: each is named as what it is, with what to do."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from fate_moe.checkpoints.gguf_file import looks_like_gguf, read_gguf
from fate_moe.errors import CheckpointError, ConfigError, FateError, UnsupportedModelError
from tests.support.gguf_files import raw_gguf

F32, Q8_0 = 0, 8


def refusal(tmp_path: Path, content: bytes, name: str = "model.gguf") -> FateError:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FateError) as caught:
        read_gguf(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    return caught.value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; download it again"),
        (b"<!DOCTYPE html><html>not found", "a web page; download the file itself"),
        (b"\n  <html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer; run git lfs pull"),
        (b'{"error": "unauthorized"}', "a JSON text"),
        (b"PK\x03\x04" + bytes(60), "a zip archive; unpack it"),
        (struct.pack("<Q", 300) + b'{"__metadata__":', "a safetensors file; give the folder"),
        (struct.pack("<II", 0x67676A74, 3), "a GGJT file, older than GGUF"),
        (struct.pack("<I", 0x67676D6C), "a GGML file, older than GGUF"),
        (b"\x80\x02ctorch", "a pickled checkpoint"),
        (bytes(64), "something else"),
        (b"GGU", "something else"),
        (b"GGUF", "ends within its header"),
        (b"GGUF\x03\x00\x00\x00", "ends within its header"),
    ],
)
def test_a_file_that_is_not_gguf_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    error = refusal(tmp_path, content)
    assert isinstance(error, CheckpointError)
    assert said in str(error)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, raw_gguf([("a", (4,), F32, 0)], order=">"))
    assert isinstance(error, UnsupportedModelError)
    assert "big-endian" in str(error)
    assert "gguf-convert-endian model.gguf little" in str(error)


@pytest.mark.parametrize(("version", "said"), [(1, "download or convert"), (4, "update fate-moe"), (0, "version 0")])
def test_other_versions_are_refused(tmp_path: Path, version: int, said: str) -> None:
    error = refusal(tmp_path, raw_gguf([("a", (4,), F32, 0)], version=version))
    assert isinstance(error, UnsupportedModelError)
    assert said in str(error)


def test_version_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(raw_gguf([("a", (4, 2), F32, 32)], version=2))
    tensor = read_gguf(tmp_path / "model.gguf").tensors["a"]
    assert (tensor.shape, tensor.length, tensor.offset % 32) == ((2, 4), 32, 0)


@pytest.mark.parametrize(
    ("kind", "named"), [(139, "type 139, IQ4_K of ik_llama.cpp"), (156, "IQ3_KS"), (31, "Q4_0_4_4"), (9999, "type 9999, unknown")]
)
def test_an_unknown_quantization_is_named(tmp_path: Path, kind: int, named: str) -> None:
    error = refusal(tmp_path, raw_gguf([("a", (4,), F32, 0), ("blk.0.b", (256,), kind, 32)]))
    assert isinstance(error, UnsupportedModelError)
    assert "cannot read: blk.0.b (" in str(error)
    assert named in str(error)


def test_a_quantization_that_the_package_cannot_dequantize_is_named(tmp_path: Path) -> None:
    assert "cannot read: b (Q8_K), c (I32);" in str(refusal(tmp_path, raw_gguf([("b", (256,), 15, 0), ("c", (4,), 26, 512)])))


def test_only_the_first_tensors_are_named(tmp_path: Path) -> None:
    error = refusal(tmp_path, raw_gguf([(f"t{i}", (256,), 139, 256 * i) for i in range(5)]))
    assert "t2 (type 139, IQ4_K of ik_llama.cpp) ... (5 in all)" in str(error)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([("a", (2000,), F32, 0)], "a missing"),
        ([("a", (4,), F32, 1 << 63)], "a missing"),
        ([("a", (16,), F32, 0), ("b", (16,), F32, 32)], "a and b overlap"),
        ([("a", (4,), F32, 8)], "not a multiple of the alignment 32"),
        ([("a", (0,), F32, 0)], "empty shape"),
        ([("a", (), F32, 0)], "0 dimensions"),
        ([("a", (1,) * 9, F32, 0)], "9 dimensions"),
        ([("a", (4,), F32, 0), ("a", (4,), F32, 32)], "it has a twice"),
        ([("a", (40,), Q8_0, 0)], "rows of 40, not a multiple of the 32 of Q8_0"),
    ],
)
def test_tensors_out_of_place_are_refused(tmp_path: Path, tensors: list[tuple[str, tuple[int, ...], int, int]], said: str) -> None:
    assert said in str(refusal(tmp_path, raw_gguf(tensors)))


def test_a_file_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    whole = raw_gguf([("a", (8,), F32, 0), ("b", (8,), F32, 32)], data=64, fields={"general.alignment": 32})
    for length in range(len(whole)):
        assert isinstance(refusal(tmp_path, whole[:length]), CheckpointError), length


def test_lengths_that_no_file_has_are_refused(tmp_path: Path) -> None:
    key = struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1 << 62)
    assert "ends within" in str(refusal(tmp_path, b"GGUF\x03\x00\x00\x00" + key + bytes(64)))
    array = struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 61)
    assert "ends within" in str(refusal(tmp_path, b"GGUF\x03\x00\x00\x00" + array + bytes(64)))
    nested = struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1)
    assert "unknown type 9" in str(refusal(tmp_path, b"GGUF\x03\x00\x00\x00" + nested + bytes(64)))


def test_a_sparse_file_cannot_claim_more_than_memory_holds(tmp_path: Path) -> None:
    """The bytes are there, all of them zero: without a limit a header of them is read for hours, or fills the memory."""
    begin, key = b"GGUF\x03\x00\x00\x00", struct.pack("<Q", 1) + b"k"
    headers = {
        "tensors": struct.pack("<QQ", 1 << 33, 0),
        "fields": struct.pack("<QQ", 0, 1 << 33),
        "entries of k": struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 0, 1 << 35),
        "bytes of a text": struct.pack("<QQ", 0, 1) + key + struct.pack("<IQ", 8, 1 << 35),
    }
    for said, header in headers.items():
        path = tmp_path / "model.gguf"
        path.write_bytes(begin + header)
        os.truncate(path, 1 << 40)
        with pytest.raises(CheckpointError, match=said):
            read_gguf(path)


def test_names_that_are_no_text_do_not_reach_the_terminal(tmp_path: Path) -> None:
    for name in ("a\n\x1b[31mb", "", "x" * 4000):
        assert "a name that is no text" in str(refusal(tmp_path, raw_gguf([(name, (4,), F32, 0)])))


def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path) -> None:
    assert "general.alignment is 48" in str(refusal(tmp_path, raw_gguf([], fields={"general.alignment": 48})))


def test_another_alignment_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(raw_gguf([("a", (4,), F32, 128)], fields={"general.alignment": 128}))
    assert read_gguf(tmp_path / "model.gguf").tensors["a"].offset % 128 == 0


def test_pieces_of_a_file_are_joined_first(tmp_path: Path) -> None:
    piece = raw_gguf([("a", (2000,), F32, 0)])
    assert "cat model.gguf.part* >" in str(refusal(tmp_path, piece, "model.gguf.part1of2"))
    assert "cat model.gguf-split-* >" in str(refusal(tmp_path, piece, "model.gguf-split-a"))


def test_the_package_missing_or_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(raw_gguf([]))
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    with pytest.raises(ConfigError, match="too old; pip install -U"):
        read_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="needs the gguf package; pip install"):
        read_gguf(tmp_path / "model.gguf")


def test_files_are_known_by_their_name_or_their_beginning(tmp_path: Path) -> None:
    for name, content, known in (("BIG.GGUF", b"", True), ("sha256-abc", b"GGUF\x03", True), ("model.bin", b"PK", False)):
        (tmp_path / name).write_bytes(content)
        assert looks_like_gguf(tmp_path / name) is known
    assert not looks_like_gguf(tmp_path / "absent")


def test_a_vocabulary_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "qwen3moe")
    writer.add_token_list(["a", "bc", ""])
    writer.add_tensor("a", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (tmp_path / "whole.gguf").read_bytes()
    assert whole.index(b"tokenizer") < 130
    for length in range(100, len(whole) - 16):
        assert isinstance(refusal(tmp_path, whole[:length]), CheckpointError), length


def test_the_vocabulary_is_counted_and_not_kept(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    writer.add_token_list(["a", "b", "c"])
    writer.add_array("qwen3moe.attention.head_count", [4, 4])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(tmp_path / "model.gguf")
    assert read.lengths["tokenizer.ggml.tokens"] == 3
    assert read.metadata == {"general.architecture": "qwen3moe", "qwen3moe.attention.head_count": [4, 4]}
