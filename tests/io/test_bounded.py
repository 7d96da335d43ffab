"""Files that are not what they seem: pipes, devices, files without end, archives that unpack to a thousand times their size."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fate_moe.io.arrays import load_arrays
from fate_moe.io.bounded import load_json, read_bounded
from fate_moe.io.tensorfile import parse_header, read_header


def test_pipes_devices_and_folders_are_not_read(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for, a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        for read in (read_bounded, load_json, read_header):
            with pytest.raises(OSError, match="no regular file"):
                read(tmp_path / name)


def test_files_that_are_too_long_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    with pytest.raises(OSError, match="at most"):
        load_json(tmp_path / "sparse")
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bounded(tmp_path / "small", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes"):
        read_bounded(tmp_path / "small", 4)


@pytest.mark.parametrize(
    ("data", "said"), [(b"[" * 100_000, "too deeply"), (b'{"a": \xff}', "no text at byte 6"), (b"", "Expecting")]
)
def test_json_of_any_kind_is_a_value_error(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        load_json(tmp_path / "a.json")
    assert len(str(caught.value)) < 200


def test_a_shape_of_thousands_of_dimensions_is_refused_at_once() -> None:
    text = b'{"a":{"dtype":"U8","shape":[' + b"9999999999999999," * 50_000 + b'1],"data_offsets":[0,1]}}'
    with pytest.raises(ValueError, match="tensor a has shape") as caught:
        parse_header(text, len(text) + 9)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("dtype", ['"' + "x" * 5000 + '"', "7", '["U8"]', '"a\\nb"'])
def test_a_dtype_that_is_no_name_is_refused_in_a_line(dtype: str) -> None:
    text = b'{"a":{"dtype":%s,"shape":[1],"data_offsets":[0,1]}}' % dtype.encode()
    with pytest.raises(ValueError, match="tensor a has the dtype") as caught:
        parse_header(text, len(text) + 9)
    assert len(str(caught.value)) < 200


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_arrays_are_read_back(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(5), b=np.zeros((0, 3)), c=np.array("x"))
    found = load_arrays(tmp_path / "a.npz", 1000)
    assert found["a"].tolist() == [0, 1, 2, 3, 4]
    assert found["b"].shape == (0, 3)
    assert str(found["c"]) == "x"


def test_archives_that_claim_too_much_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "bomb.npz", {"a.npy": npy(np.zeros(50_000_000, np.uint8))})
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ValueError, match="it unpacks to 50000128 bytes"):
        load_arrays(bomb, 1 << 20)
    header = npy(np.zeros(3, np.uint8)).replace(b"(3,)", b"(1 << 40,)".replace(b"1 << 40", b"3" + b"0" * 15))
    with pytest.raises(ValueError, match=r"ends early|Header"):
        load_arrays(archive(tmp_path / "claim.npz", {"a.npy": header}), 1 << 20)


@pytest.mark.parametrize(
    "members",
    [
        {"a.txt": b"x"},
        {"../a": b"x"},
        {"a.npy": b""},
        {"a.npy": b"\x93NUMPY\x09\x00"},
        {"a.npy": npy(np.array([{}], dtype=object))},
        {"a.npy": npy(np.zeros(3))[:-1]},
    ],
)
def test_other_archives_are_value_errors(tmp_path: Path, members: dict[str, bytes]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # each says it in words of its own
        load_arrays(archive(tmp_path / "a.npz", members), 1 << 20)


def test_files_that_are_no_archives_are_value_errors(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 no zip", b"\x80\x04pickle"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError):  # noqa: PT011
            load_arrays(tmp_path / "a.npz", 1 << 20)
