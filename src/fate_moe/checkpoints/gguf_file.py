"""Reads the header of a GGUF file: metadata, and the type, shape and place of every tensor, all checked against the file's length.

The gguf package's reader takes seconds for a vocabulary, misreads big-endian files and accepts tensors that overlap, so the header
is read here; what the numbers of types mean, and the weights, stay the package's. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_moe.checkpoints.files import some
from fate_moe.errors import CheckpointError, ConfigError, UnsupportedModelError

__all__ = ["GgufFile", "GgufTensor", "gguf_package", "looks_like_gguf", "read_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# struct's formats of the metadata's types, by their numbers; 8 is a string, 9 an array.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MOST_FIELDS, _MOST_TENSORS = 1 << 16, 1 << 20
_MOST_TOKENS = 1 << 24  # entries of a vocabulary's array; other arrays have one a layer
_MOST_ENTRIES = 1 << 16
_MOST_TEXT = 16 << 20  # bytes of a text, such as a chat template
_MAX_NAME = 255  # of a field or tensor; llama.cpp takes tensors' of up to 63
_DEFAULT_ALIGNMENT = 32
_AGAIN = "download it again"
# Beginnings of files that people have under the name of a GGUF file.
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer; run git lfs pull in its folder"),
    (b"<", "a web page; download the file itself (the link with /resolve/, not /blob/)"),
    (b"{", "a JSON text, such as a server's answer; download the file itself"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it"),
    (b"\x80\x02", "a pickled checkpoint of PyTorch, which is never read; use the model's safetensors or GGUF"),
    (b"lmgg", "a GGML file, older than GGUF; download a GGUF file of the model"),
    (b"fmgg", "a GGMF file, older than GGUF; download a GGUF file of the model"),
    (b"tjgg", "a GGJT file, older than GGUF; download a GGUF file of the model"),
)
# Types of ik_llama.cpp and of older files. Those of 200 and above are repacked (_R4, _R8).
_FOREIGN = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "I2_S or IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    **{number: f"{name} of ik_llama.cpp" for number, name in {
        133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K",
        144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT",
        156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT",
    }.items()},
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place: ``length`` bytes at ``offset`` of ``file``. ``shape`` is row-major; a row has ``row_bytes`` bytes."""

    file: Path
    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def length(self) -> int:
        return self.row_bytes * math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """A checked header. ``metadata`` lacks the vocabulary's arrays; ``lengths`` has the length of every array."""

    path: Path
    metadata: dict[str, Any]
    lengths: dict[str, int]
    tensors: dict[str, GgufTensor]


def gguf_package(path: Path) -> Any:
    """The gguf package. Raises ConfigError if it is missing, or older than the features that are used."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"{path}: reading GGUF needs the gguf package; pip install 'fate-moe[gguf]'") from error
    needed = ("GGML_QUANT_SIZES", "GGMLQuantizationType", "MODEL_ARCH_NAMES", "dequantize", "get_tensor_name_map")
    if any(not hasattr(gguf, name) for name in needed):
        raise ConfigError(f"{path}: the installed gguf package is too old; pip install -U 'fate-moe[gguf]'")
    return gguf


def looks_like_gguf(path: Path) -> bool:
    """Whether the file at ``path`` is named as a GGUF file, in whatever case, or begins as one (Ollama's files have no suffix)."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """The header of the file at ``path``.

    Raises CheckpointError for a file that is torn, malformed or not GGUF, UnsupportedModelError for a byte order, version or
    quantization that is not read, ConfigError if the gguf package is missing.
    """
    gguf = gguf_package(path)
    try:
        with open(path, "rb") as file:
            _check_begin(path, file.read(64))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error
    with data:
        try:
            return _Header(path, data, gguf).read()
        except _MalformedError as error:
            raise CheckpointError(f"{path} is not a complete GGUF file: {error}; {_AGAIN}{_parts_hint(path)}") from error


class _MalformedError(Exception):
    """The header contradicts the format or the file's length; the text says how."""


class _Header:
    def __init__(self, path: Path, data: mmap.mmap, gguf: Any) -> None:
        self._path, self._data, self._gguf, self._at = path, data, gguf, 8
        self._lengths: dict[str, int] = {}

    def read(self) -> GgufFile:
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        self._limit("fields", num_fields, _MOST_FIELDS)
        self._limit("tensors", num_tensors, _MOST_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._name()
            if key in metadata or key in self._lengths:
                raise _MalformedError(f"the metadata has {key} twice")
            value = self._value(key)
            if value is not None:
                metadata[key] = value
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise _MalformedError(f"general.alignment is {alignment!r}, not a power of two of at least 8")
        self._check_kinds([(name, kind) for name, _, kind, _ in infos])
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for info in infos:
            tensor = self._tensor(start, alignment, *info)
            if tensor.name in tensors:
                raise _MalformedError(f"it has {tensor.name} twice")
            tensors[tensor.name] = tensor
        self._check_places(tensors)
        return GgufFile(self._path, metadata, self._lengths, tensors)

    def _take(self, length: int) -> int:
        """Where the next ``length`` bytes begin."""
        begin = self._at
        if length > len(self._data) - begin:
            raise _MalformedError("it ends within its header")
        self._at += length
        return begin

    def _number(self, kind: str) -> Any:
        return struct.unpack_from(f"<{kind}", self._data, self._take(struct.calcsize(f"<{kind}")))[0]

    def _string(self) -> str:
        length = self._number("Q")
        begin = self._take(length)
        self._limit("bytes of a text", length, _MOST_TEXT)
        return self._data[begin : begin + length].decode("utf-8", "replace")

    def _name(self) -> str:
        """A string that errors may show."""
        name = self._string()
        if not name.isprintable() or not 1 <= len(name) <= _MAX_NAME:
            raise _MalformedError(f"it has a name that is no text ({name[:20]!r})")
        return name

    def _value(self, key: str) -> Any:
        """The value of ``key``, None for an array of the vocabulary."""
        kind = self._number("I")
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._format(key, kind))
        kind, count = self._number("I"), self._number("Q")
        self._lengths[key] = count
        is_vocabulary = key.startswith("tokenizer.")
        if kind != _STRING:
            begin = self._take(count * struct.calcsize(f"<{self._format(key, kind)}"))
        self._limit(f"entries of {key}", count, _MOST_TOKENS if is_vocabulary else _MOST_ENTRIES)
        if kind == _STRING and is_vocabulary:
            return self._skip_strings(count)
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        return None if is_vocabulary else list(struct.unpack_from(f"<{count}{self._format(key, kind)}", self._data, begin))

    def _limit(self, what: str, number: int, most: int) -> None:
        """Headers of sparse files may claim more than memory or an hour can hold, and have it."""
        if number > most:
            raise _MalformedError(f"it has {number} {what}, and at most {most} are expected")

    def _skip_strings(self, count: int) -> None:
        """Hundreds of thousands in a large vocabulary, so without a call for each."""
        length, at, last = struct.Struct("<Q").unpack_from, self._at, len(self._data) - 8
        for _ in range(count):
            if at > last:
                raise _MalformedError("it ends within its header")
            at += 8 + length(self._data, at)[0]
        self._take(at - self._at)

    def _format(self, key: str, kind: int) -> str:
        if kind not in _FORMATS:
            raise _MalformedError(f"{key} has a value of the unknown type {kind}")
        return _FORMATS[kind]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, row-major shape, type, offset within the data."""
        name, count = self._name(), self._number("I")
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise _MalformedError(f"{name} has {count} dimensions")
        shape = tuple(self._number("Q") for _ in range(count))[::-1]
        if min(shape) < 1:
            raise _MalformedError(f"{name} has the empty shape {shape}")
        return name, shape, self._number("I"), self._number("Q")

    def _check_kinds(self, kinds: list[tuple[str, int]]) -> None:
        """Raises UnsupportedModelError unless the gguf package dequantizes every tensor's type."""
        unknown = {number: name for number in {kind for _, kind in kinds} if (name := self._refused_kind(number)) is not None}
        if refused := [f"{name} ({unknown[kind]})" for name, kind in kinds if kind in unknown]:
            raise UnsupportedModelError(
                f"{self._path}: quantized in a way that the gguf package cannot read: {some(refused)}; use a GGUF of another type "
                "(Q2_K to Q8_0, IQ, MXFP4, BF16) or the model's safetensors"
            )

    def _refused_kind(self, number: int) -> str | None:
        """The type's name if the package cannot dequantize it, else None."""
        import numpy as np

        try:
            kind = self._gguf.GGMLQuantizationType(number)
            self._gguf.dequantize(np.zeros((1, self._gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except ValueError:
            repacked = "repacked by ik_llama.cpp" if 200 <= number < 400 else "unknown"
            return f"type {number}, {_FOREIGN.get(number, repacked)}"
        except (NotImplementedError, KeyError):
            return str(kind.name)
        return None

    def _tensor(self, start: int, alignment: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        kind = self._gguf.GGMLQuantizationType(number)
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _MalformedError(f"{name} has rows of {shape[-1]}, not a multiple of the {block} of {kind.name}")
        if offset % alignment:
            raise _MalformedError(f"{name} is at {offset}, not a multiple of the alignment {alignment}")
        return GgufTensor(self._path, name, kind, shape, start + offset, shape[-1] // block * size)

    def _check_places(self, tensors: dict[str, GgufTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        if beyond := [tensor.name for tensor in ordered if tensor.offset + tensor.length > len(self._data)]:
            needed = max(tensor.offset + tensor.length for tensor in ordered)
            raise _MalformedError(f"it has {len(self._data)} of the {needed} bytes that its tensors need ({some(beyond)} missing)")
        for one, other in itertools.pairwise(ordered):
            if one.offset + one.length > other.offset:
                raise _MalformedError(f"{one.name} and {other.name} overlap")


def _check_begin(path: Path, begin: bytes) -> None:
    """Raises unless ``begin`` is that of a GGUF file in a version and byte order that is read."""
    if not begin:
        raise CheckpointError(f"{path} is empty; {_AGAIN}")
    if begin[:4] != _MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file but {_what_it_is(begin)}")
    if len(begin) < 8:
        raise CheckpointError(f"{path} is not a complete GGUF file: it ends within its header; {_AGAIN}{_parts_hint(path)}")
    version = int.from_bytes(begin[4:8], "little")
    if not version & 0xFFFF and version:
        # Not swapped here: the gguf package's writer leaves the bytes of quantized and bf16 weights in little-endian order,
        # its gguf-convert-endian swaps them, and nothing in the file says which.
        raise UnsupportedModelError(
            f"{path} is a big-endian GGUF file, which is not read; download the little-endian one, or convert a copy with: "
            f"gguf-convert-endian {path.name} little"
        )
    if version not in _VERSIONS:
        newer = version > max(_VERSIONS)
        remedy = "update fate-moe, or download a file of version 3" if newer else "download or convert it again"
        raise UnsupportedModelError(f"{path} is of GGUF version {version}, and versions 2 and 3 are read; {remedy}")


def _what_it_is(begin: bytes) -> str:
    said = next((what for magic, what in _OTHERS if begin.lstrip().startswith(magic)), None)
    if said is None and begin[8:9] == b"{":
        said = "a safetensors file; give the folder that it is in"
    return said or f"something else (it begins with {begin[:4]!r}); {_AGAIN}"


def _parts_hint(path: Path) -> str:
    """What to do with a file that was cut in pieces, which some publishers do to stay under a limit of size."""
    named = _piece(path.name)
    return f", or join the pieces first: cat {named}* > WHOLE.gguf" if named else ""


def _piece(name: str) -> str | None:
    for mark in (".part", "-split-", ".gguf.0", ".gguf.a"):
        if mark in name:
            return name[: name.index(mark) + len(mark)].removesuffix("0").removesuffix("a")
    return None
