"""Damage to files: bytes, lengths, headers, and what stands at a file's name instead of it."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.torture.json_damage import damage_json

__all__ = ["damage"]

_NUMBERS = (
    0,
    1,
    7,
    255,
    4095,
    4097,
    *((1 << power) - less for power in (16, 31, 32, 48, 62, 63, 64) for less in (0, 1) if power < 64),
)
_FOREIGN = (
    b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    b"PK\x03\x04" + bytes(60),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    b"<!DOCTYPE html><html></html>",
    b"\x1f\x8b\x08" + bytes(40),
    b"{}",
    b"[]",
    b"\xff\xfe{\0}\0",
    b"",
)
_BOMB = 320 << 20  # bytes of an array in a zip that unpacks to a thousand times its size


def damage(path: Path, dice: Random, outside: Path) -> str:
    """Damage the file ``path`` and return the name of what was done; ``outside`` is a whole file of the kind, in another folder."""
    data = path.read_bytes()
    special: list[Callable[[], str]] = []
    if path.suffix == ".json":
        special = [lambda: _write_json(path, data, dice)] * 6
    elif path.suffix == ".safetensors":
        special = [lambda: _header(path, data, dice)] * 4
    elif path.suffix == ".npz":
        special = [lambda: _zip(path, data, dice)] * 5
    elif path.suffix == ".gguf":
        special = [lambda: _numbers(path, data[: 1 << 14], data, dice)] * 5
    usual = [lambda: _bytes(path, data, dice)] * 4 + [lambda: _instead(path, dice, outside)]
    chosen: Callable[[], str] = dice.choice([*special, *usual])
    return chosen()


def _write_json(path: Path, data: bytes, dice: Random) -> str:
    text, kind = damage_json(data.decode(), dice)
    path.write_bytes(text.encode(errors="surrogatepass"))
    return f"JSON: {kind}"


def _header(path: Path, data: bytes, dice: Random) -> str:
    """A safetensors header with another text; with the old room if it fits, so that all else stays in its place."""
    room = int.from_bytes(data[:8], "little")
    if dice.random() < 0.15:
        path.write_bytes(dice.choice(_NUMBERS).to_bytes(8, "little") + data[8:])
        return "header: its length"
    text, kind = damage_json(data[8 : 8 + room].decode(), dice)
    header = text.encode(errors="surrogatepass")
    padded = header.ljust(room) if dice.random() < 0.8 else header
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + data[8 + room :])
    return f"header: {kind}"


def _numbers(path: Path, head: bytes, data: bytes, dice: Random) -> str:
    """One number of a binary header."""
    at = dice.randrange(max(1, len(head) - 8))
    form = dice.choice(("<I", "<Q"))
    value = struct.pack(form, dice.choice(_NUMBERS) % (1 << 8 * struct.calcsize(form)))
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    return "header: a number"


def _bytes(path: Path, data: bytes, dice: Random) -> str:
    size = len(data)
    at, length = dice.randrange(size + 1), min(size, int(2 ** dice.uniform(0, 14)))
    other = dice.randrange(size + 1)
    kinds: dict[str, Callable[[], bytes | None]] = {
        "a flipped bit": lambda: _flipped(data, dice, 1),
        "many flipped bits": lambda: _flipped(data, dice, dice.randrange(2, 64)),
        "cut": lambda: data[:at],
        "bytes missing": lambda: data[:at] + data[at + length :],
        "bytes inserted": lambda: data[:at] + dice.randbytes(length) + data[at:],
        "bytes repeated": lambda: data[: at + length] + data[at:],
        "bytes overwritten": lambda: (
            data[:at] + dice.choice((bytes, dice.randbytes, lambda n: b"\xff" * n))(length) + data[at + length :]
        ),
        "blocks exchanged": lambda: _exchanged(data, at // 4096 * 4096, other // 4096 * 4096, 4096),
        "too long": lambda: data + bytes(dice.choice((1, 511, 4096, 1 << 20))),
        "a torn end": lambda: data[:at] + bytes(size - at),
    }
    name = dice.choice(sorted(kinds))
    path.write_bytes(kinds[name]() or b"")
    return name


def _flipped(data: bytes, dice: Random, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count if changed else 0):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _exchanged(data: bytes, one: int, other: int, length: int) -> bytes:
    changed = bytearray(data)
    first, second = data[one : one + length], data[other : other + length]
    changed[one : one + len(second)] = second
    changed[other : other + len(first)] = first
    return bytes(changed)


def _instead(path: Path, dice: Random, outside: Path) -> str:
    """Something else under the file's name."""
    kind = dice.choice(("foreign", "missing", "folder", "fifo", "sparse", "link", "device", "loop", "dangling", "other file"))
    if kind == "sparse":  # the file's length stays plausible to nobody, its bytes take no room
        os.truncate(path, dice.choice((1 << 30, 1 << 36, 1 << 40)))
        return "a sparse file"
    path.unlink()
    if kind == "foreign":
        path.write_bytes(dice.choice(_FOREIGN))
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "device":
        path.symlink_to(dice.choice(("/dev/zero", "/dev/full", "/dev/null", "/proc/self/mem", "/proc/kmsg")))
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to(path.parent.parent / "made-by-a-link")
    elif kind == "other file":
        path.write_bytes(outside.read_bytes())
    return {"link": "a link that leaves the folder", "device": "a link to a device", "fifo": "a named pipe"}.get(
        kind, f"instead: {kind}"
    )


def _zip(path: Path, data: bytes, dice: Random) -> str:
    """An array of a .npz with another header, name, compression or size."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):
        return _bytes(path, data, dice)
    name = dice.choice(sorted(members))
    kind = dice.choice(
        ("a bomb", "dtype", "a huge shape", "name", "twice", "objects", "compression", "no array", "missing", "encrypted")
    )
    written = list(members.items())
    method = zipfile.ZIP_STORED
    if kind == "a bomb":
        head = _npy_header("|u1", (_BOMB,))
        written = [(n, head if n == name else content) for n, content in written]
    elif kind in ("dtype", "a huge shape", "objects", "no array"):
        content = {
            "dtype": lambda: (
                _npy_header(dice.choice(("<f8", "<i8", "|S3", "|V0", "<M8[s]", "|b1", "<c16", ">f4")), (2, 2)) + bytes(64)
            ),
            "a huge shape": lambda: _npy_header(
                "<f4", dice.choice(((1 << 40,), (1 << 62,), (1 << 20, 1 << 20), (0, 1 << 60), (-1,)))
            ),
            "objects": lambda: _npy_header("|O", (1,)) + b"\x80\x04cos\nsystem\n(S'true'\ntR.",
            "no array": lambda: dice.choice((b"", b"\x93NUMPY", b"\x93NUMPY\x01\0\xff\xff" + b"(" * 70_000, b"x")),
        }[kind]()
        written = [(n, content if n == name else other) for n, other in written]
    elif kind == "name":
        new = dice.choice(("../x.npy", "/etc/x.npy", "x", "x/", name.removesuffix(".npy"), "a\nb.npy"))
        written = [(new if n == name else n, content) for n, content in written]
    elif kind == "twice":
        written.append((name, members[dice.choice(sorted(members))]))
    elif kind == "missing":
        written = [(n, content) for n, content in written if n != name]
    elif kind == "compression":
        method = dice.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for n, content in written:
            if kind == "a bomb" and n == name:
                _write_bomb(archive, n, content)
            else:
                archive.writestr(n, content)
    made = bytearray(out.getvalue())
    if kind == "encrypted":
        for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            begin = made.find(mark)
            made[begin + at] |= 1
    path.write_bytes(made)
    return f"zip: {kind}"


def _write_bomb(archive: zipfile.ZipFile, name: str, head: bytes) -> None:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    info._compresslevel = 1  # type: ignore[attr-defined]
    with archive.open(info, "w") as member:
        member.write(head)
        for _ in range(_BOMB >> 24):
            member.write(bytes(1 << 24))


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"
