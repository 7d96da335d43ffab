"""Reads Hugging Face checkpoints: folders of safetensors files, plain, in block-scaled FP8, MXFP4 or packed INT4."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fate_moe.adapter.config_rules import read_config
from fate_moe.checkpoints.files import SAME_PLACE, find_weights, some
from fate_moe.checkpoints.gguf_file import looks_like_gguf
from fate_moe.checkpoints.mxfp4 import BLOCKS, SCALES, dequantize_mxfp4, mxfp4_shape
from fate_moe.checkpoints.packed import PACKED_METHODS, Packed, find_packed
from fate_moe.errors import CheckpointError, UnsupportedModelError, first_line
from fate_moe.io.bounded import read_bounded
from fate_moe.io.direct import drop_from_page_cache
from fate_moe.io.json_file import parse_json, unmarked_json, what_it_is
from fate_moe.quant.dtypes import TORCH_DTYPES

__all__ = ["COMPANIONS", "Checkpoint", "has_tokenizer", "resolve_checkpoint"]

# Files that are copied into the store unchanged, so that it runs without its checkpoint.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "merges.txt",
    "chat_template*",
)
# Those that hold a vocabulary; a tokenizer has at least one of them.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
# Files to download. Some repositories hold the same weights again in other formats, in subfolders.
_DOWNLOADED = ("*.safetensors", "*.safetensors.index.json", *COMPANIONS)
_SKIPPED = ("*/*", "consolidated*")

# Tensor names of quantized formats that are not supported (bitsandbytes, MXFP4 without scales, variants of supported formats).
_UNSUPPORTED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_packed|weight_scale|weight_zero_point)$|_proj_blocks$"
)
_SCALE = "_scale_inv"
_SCALE_DTYPES = ("BF16", "F16", "F32", "F64", "F8_E8M0")
_PLAIN = ("BF16", "F16", "F32", "F64")
_INTEGERS = ("BOOL", "U8", "I8", "I16", "I32", "I64")
_USE = "use the checkpoint in bf16, FP8 with weight_scale_inv, MXFP4, or INT4 by GPTQ, AWQ or compressed-tensors"


def resolve_checkpoint(name: str | Path) -> Path:
    """The folder (or GGUF file) of a checkpoint: ``name``, or a snapshot of the hub id ``org/name``, downloaded on first use.

    Raises CheckpointError when ``name`` is neither a folder nor a hub id that can be downloaded.
    """
    folder = Path(name)
    if folder.is_dir() or (folder.is_file() and looks_like_gguf(folder)):
        return folder
    if folder.is_file() and folder.name.endswith((".safetensors", ".json")):
        raise CheckpointError(f"{folder} is one file of a checkpoint; give its folder: {folder.parent}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or folder.exists():
        raise CheckpointError(f"{name} is neither a folder nor a hub id (org/name); give the folder of a Hugging Face checkpoint")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(_DOWNLOADED), ignore_patterns=list(_SKIPPED)))
    except Exception as error:  # offline, no such model, gated, disk full: the hub's message says which
        raise CheckpointError(
            f"{name} is not a folder and cannot be downloaded from the hub ({first_line(error)}); check the name and the connection"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has a tokenizer's vocabulary."""
    return any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern))


class Checkpoint:
    """The tensors of a checkpoint folder, by name. ``read`` reads a tensor, or one entry of it, from disk.

    Block-scaled FP8 weights (``X`` of F8_E4M3 with ``X_scale_inv``, as in DeepSeek-V3) and MXFP4 weights (``X_blocks`` and
    ``X_scales``, as in gpt-oss) appear as plain bf16 tensors ``X``; packed weights (see ``checkpoints.packed``) in their scales'
    dtype. Scales do not appear. ``read_packed`` returns the codes.

    ``unread`` says why the reader itself leaves a tensor out, by "TENSOR", or "FILE: TENSOR" for a copy. ``absent`` says why a
    tensor that a file or the index names cannot be read, and what to do.
    """

    packed_names: frozenset[str] = frozenset()  # the tensors that ``read_packed`` can read
    unread: Mapping[str, str] = MappingProxyType({})
    absent: Mapping[str, str] = MappingProxyType({})

    def __init__(self, folder: Path) -> None:
        """Reads the header of every file. Raises CheckpointError for missing, damaged or pickled files, UnsupportedModelError for a
        quantized format that is not supported."""
        self.folder = folder
        weights = find_weights(folder)
        quantization = _quantization(folder)
        self.files, self._entries = weights.files, weights.entries
        self.unread, self.absent = weights.unread, weights.absent
        self._block = _fp8_block(folder, quantization)
        self._mxfp4 = {name.removesuffix(BLOCKS) for name in self._entries if self._has_mxfp4(name)}
        try:
            self._packed = find_packed(self._entries, quantization)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise UnsupportedModelError(f"{folder / 'config.json'}: {error} is not supported; {_USE}") from error
        self._parts = {name + suffix for name in self._mxfp4 for suffix in (BLOCKS, SCALES)}
        self._parts |= {part for weight in self._packed.values() for part in weight.parts.values()}
        self._refuse_unsupported()
        group_size = quantization.get("group_size")
        self._check_quantized(group_size if type(group_size) is int else 0)
        names = (*self._entries, *self._mxfp4, *self._packed)
        self.names = [name for name in names if name not in self._parts and not name.endswith(_SCALE)]
        self.packed_names = frozenset(self._packed)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor that ``read`` returns."""
        if name in self._mxfp4:
            return torch.bfloat16
        if name in self._packed:
            return self.dtype(self._packed[name].scale_name)
        dtype = TORCH_DTYPES[self._entries[name][1].dtype]
        return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor that ``read`` returns."""
        if name in self._mxfp4:
            return mxfp4_shape(self._shape_in_file(name + BLOCKS))
        if name in self._packed:
            return self._packed[name].shape(self._shape_in_file)
        return self._shape_in_file(name)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor ``name``, or entry ``index`` of its first dimension as [1, ...].

        Raises CheckpointError when the bytes cannot be read or the scales do not fit the weights.
        """
        if name in self._mxfp4:
            try:
                return dequantize_mxfp4(self._read_raw(name + BLOCKS, index), self._read_raw(name + SCALES, index))
            except ValueError as error:
                path = self._entries[name + BLOCKS][0]
                raise CheckpointError(f"{path}: {name}{BLOCKS}: {error}; fetch the checkpoint again") from error
        if name in self._packed:
            return self.read_packed(name).weight.to(self.dtype(name))
        tensor = self._read_raw(name, index)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        scale_name = name + _SCALE
        is_stacked = index is not None and len(self.shape(scale_name)) == tensor.ndim == 3
        scale = self._read_raw(scale_name, index if is_stacked else None).float()
        try:
            return dequantize_blocks(tensor, scale, self._block)
        except ValueError as error:
            raise CheckpointError(f"{self._entries[scale_name][0]}: {scale_name}: {error}; fetch the checkpoint again") from error

    def companions(self) -> list[Path]:
        """The files that go with the weights: configuration, tokenizer, chat template."""
        return sorted({path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()})

    def read_companion(self, path: Path) -> bytes:
        """The bytes of one of ``companions`` for a store: JSON as UTF-8 without a byte order mark, all else as it is.

        Raises CheckpointError when it cannot be read, is no JSON, or is a pointer or a web page in the place of the file.
        """
        try:
            data = read_bounded(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error
        try:
            if path.suffix == ".json":
                parse_json(data, unique=False)
                return unmarked_json(data)
        except ValueError as error:
            raise CheckpointError(f"{path} {error}") from error
        if reason := what_it_is(data):
            raise CheckpointError(f"{path} {reason}")
        return data

    def read_packed(self, name: str) -> Packed:
        """Codes, scales and zeros of ``name``, one of ``packed_names``. Raises CheckpointError when they do not match."""
        try:
            return self._packed[name].unpack(lambda part: self._read_raw(part, None))
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be unpacked ({error}); fetch the checkpoint again") from error

    def _read_raw(self, name: str, index: int | None) -> Tensor:
        path, entry = self._entries[name]
        shape, offset, length = entry.shape, entry.offset, entry.length
        if index is not None:
            length //= shape[0]
            offset, shape = offset + index * length, (1, *shape[1:])
        data = bytearray(length)
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                got = file.readinto(data)
                drop_from_page_cache(file, offset, length)  # no tensor is read twice
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); fetch the checkpoint again") from error
        if got < length:
            raise CheckpointError(f"{path} ends within {name}; fetch the checkpoint again")
        if not length:
            return torch.empty(shape, dtype=TORCH_DTYPES[entry.dtype])
        return torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).view(shape)

    def _has_mxfp4(self, name: str) -> bool:
        """Whether ``name`` is a tensor of MXFP4 blocks that has scales, both U8."""
        parts = (name, name.removesuffix(BLOCKS) + SCALES)
        return name.endswith(BLOCKS) and all(part in self._entries and self._entries[part][1].dtype == "U8" for part in parts)

    def _refuse_unsupported(self) -> None:
        refused = [name for name in self._entries if name not in self._parts and not self._is_supported(name)]
        if refused:
            path, _ = self._entries[refused[0]]
            raise UnsupportedModelError(
                f"{path}: {some([f'{name} ({self._entries[name][1].dtype})' for name in refused])} "
                f"{'is' if len(refused) == 1 else 'are'} quantized in a way that is not supported; {_USE}"
            )

    def _is_supported(self, name: str) -> bool:
        dtype = self._entries[name][1].dtype
        if _UNSUPPORTED.search(name):
            return False
        if name.endswith(_SCALE):
            return dtype in _SCALE_DTYPES and self._dtype_in_file(name.removesuffix(_SCALE)) == "F8_E4M3"
        if dtype == "F8_E4M3":
            return name + _SCALE in self._entries
        return dtype in _PLAIN or (dtype in _INTEGERS and not name.endswith("weight"))

    def _dtype_in_file(self, name: str) -> str | None:
        return self._entries[name][1].dtype if name in self._entries else None

    def _check_quantized(self, group_size: int) -> None:
        """Raises CheckpointError, from headers alone, where scales and codes do not fit together."""
        try:
            for name in (name for name in self._entries if name.endswith(_SCALE)):
                expected = block_scale_shape(self._shape_in_file(name.removesuffix(_SCALE)), self._shape_in_file(name), self._block)
                if self._shape_in_file(name) != expected:
                    raise ValueError(f"scales of shape {self._shape_in_file(name)} where blocks of {self._block} need {expected}")
            for name in (weight + BLOCKS for weight in self._mxfp4):
                mxfp4_shape(self._shape_in_file(name), self._shape_in_file(name.removesuffix(BLOCKS) + SCALES))
            for name in self._packed:
                self._packed[name].check(self._shape_in_file, self._dtype_in_file, group_size)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {name}: {error}; {SAME_PLACE}") from error

    def _shape_in_file(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1].shape


def block_scale_shape(weights: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape [..., ceil(R / block rows), ceil(C / block cols)] that scales of ``weights`` [..., R, C] need.

    A single number fits all weights. Raises ValueError for weights that are not matrices.
    """
    if math.prod(scale) == 1:
        return scale
    if len(weights) < 2:
        raise ValueError(f"block-scaled weights of shape {weights}")
    return (*weights[:-2], -(-weights[-2] // block[0]), -(-weights[-1] // block[1]))


def dequantize_blocks(weights: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """``weights`` F8_E4M3 [..., R, C] in bf16: each block of shape ``block`` (smaller at the edges) times its fp32 ``scale``.

    ``scale`` is [..., ceil(R / block rows), ceil(C / block cols)] or a single number. Raises ValueError for any other shape.
    """
    if scale.numel() == 1:
        return (weights.float() * scale.view(())).bfloat16()
    rows, cols = weights.shape[-2:]
    if tuple(scale.shape) != (expected := block_scale_shape(tuple(weights.shape), tuple(scale.shape), block)):
        raise ValueError(f"scales of shape {tuple(scale.shape)} where blocks of {block} need {expected}")
    out = torch.empty(weights.shape, dtype=torch.bfloat16)
    # One row of blocks at a time: the whole matrix in fp32 would take four times the memory of the source.
    for i, row in enumerate(range(0, rows, block[0])):
        by_column = scale[..., i : i + 1, :].repeat_interleave(block[1], dim=-1)[..., :cols]
        out[..., row : row + block[0], :] = weights[..., row : row + block[0], :].float() * by_column
    return out


def _quantization(folder: Path) -> dict[str, Any]:
    """config.json's ``quantization_config``, {} if absent. Raises UnsupportedModelError for a method that is not supported."""
    path = folder / "config.json"
    quantization = read_config(folder).get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config is {quantization!r}, not an object; take the checkpoint's own file")
    if quantization and quantization.get("quant_method") not in ("fp8", "mxfp4", *PACKED_METHODS):
        raise UnsupportedModelError(f"{path}: quantization {quantization.get('quant_method')!r} is not supported; {_USE}")
    return quantization


def _fp8_block(folder: Path, quantization: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale in block-scaled FP8."""
    block = quantization.get("weight_block_size") or (128, 128)
    if not _is_block(block):
        raise CheckpointError(
            f"{folder / 'config.json'}: weight_block_size {block!r} is not a pair of sizes; fetch the checkpoint again"
        )
    return int(block[0]), int(block[1])


def _is_block(block: Any) -> bool:
    return isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
