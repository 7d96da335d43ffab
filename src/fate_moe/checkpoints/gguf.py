"""GGUF files, the checkpoints of llama.cpp, as a source: one file or several, dequantized tensor by tensor.

Experts become bf16 whatever their type; tensors that are F32 in the file (norms, routers, biases) stay fp32. Every tensor and every
key of the metadata is used, known to have no effect, or refused, before anything is read.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fate_moe.adapter.meta_model import build_meta_model
from fate_moe.checkpoints.files import some
from fate_moe.checkpoints.gguf_config import build_config, find_model_type, special_tokens
from fate_moe.checkpoints.gguf_file import GgufFile, GgufTensor, gguf_package, read_gguf
from fate_moe.checkpoints.gguf_metadata import Metadata
from fate_moe.checkpoints.gguf_names import find_sources, why_unread
from fate_moe.checkpoints.gguf_rope import TABLES
from fate_moe.checkpoints.source import COMPANIONS, Checkpoint, has_tokenizer
from fate_moe.errors import CheckpointError, ConfigError, UnsupportedModelError, first_line

__all__ = ["NO_TOKENIZER", "GgufCheckpoint", "config_folder", "find_gguf", "open_checkpoint"]

_log = logging.getLogger(__name__)
NO_TOKENIZER = "tokenizer-missing.txt"  # its name is one of COMPANIONS
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_QUANTIZATION_VERSION = 2  # of ggml's blocks since 2023


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that ``path`` means: itself, or the one model in a folder that holds no other weights. None: a folder of these.

    Raises CheckpointError for a folder of several models.
    """
    if path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and not _NOT_MODELS.search(file.name))
    found = [file for file in found if not (split := _SPLIT.fullmatch(file.name)) or int(split[2]) == 1] or found[:1]
    if len(found) > 1:
        raise CheckpointError(f"{path} has several GGUF files ({some([file.name for file in found])}); give one of them")
    return found[0] if found else None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, a folder or a GGUF file. Raises CheckpointError and UnsupportedModelError."""
    file = find_gguf(path)
    return GgufCheckpoint(file) if file is not None else Checkpoint(path)


@contextmanager
def config_folder(path: Path) -> Iterator[Path]:
    """The folder with the config.json of the checkpoint at ``path``. For a GGUF file it is temporary and lasts for the context."""
    file = find_gguf(path)
    checkpoint = GgufCheckpoint(file) if file is not None else None
    yield checkpoint.folder if checkpoint else path


class GgufCheckpoint(Checkpoint):
    """A GGUF file with transformers' parameter names. ``folder`` is temporary and holds config.json and the tokenizer.

    ``unread`` names the file's tensors that make no parameter, and why they need not.
    """

    def __init__(self, path: Path) -> None:
        """Reads everything except the weights. Raises CheckpointError for damaged or missing files, metadata or tensors,
        UnsupportedModelError for what is not supported, ConfigError if the gguf package is not installed."""
        self._dequantize: Any = gguf_package(path).dequantize
        self.files = _all_files(path)
        parts = [read_gguf(file) for file in self.files]
        _check_parts(parts)
        self._tensors = {tensor.name: tensor for part in parts for tensor in part.tensors.values()}
        self._data: dict[Path, np.memmap[Any, np.dtype[np.uint8]]] = {}
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        try:
            self._describe(parts[0])
        except (CheckpointError, ConfigError) as error:
            said = str(error).removeprefix(f"{self.folder / 'config.json'}: ")
            raise type(error)(f"{path}: {said}") from error
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # whatever a hostile header makes arithmetic raise
            raise CheckpointError(f"{path}: its metadata does not describe a model ({error!r}); download it again") from error

    def _describe(self, first: GgufFile) -> None:
        """Writes config.json and finds the source of each parameter. Raises errors without the file's name."""
        fields = first.metadata
        architecture = _architecture(fields)
        _check_general(fields, self._tensors)
        metadata = Metadata(fields, architecture)
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        tables = {name: self._table(name) for name in TABLES if name in self._tensors}
        family = find_model_type(metadata, shapes)
        config, used = build_config(family, metadata, shapes, tables)
        tokens = first.lengths.get("tokenizer.ggml.tokens", 0)
        if tokens > config["vocab_size"]:
            raise CheckpointError(
                f"its vocabulary has {tokens} tokens, token_embd.weight {config['vocab_size']} rows; download or convert it again"
            )
        config |= special_tokens(fields, config["vocab_size"])
        num_layers = config["num_hidden_layers"]
        (self.folder / "config.json").write_text(json.dumps(config))
        model = build_meta_model(self.folder)
        _check_rotary(model, metadata)
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._sources = find_sources(model, architecture, shapes)
        self.names = list(self._sources)
        used |= {part for source in self._sources.values() for part in source.parts}
        reasons = {
            name: why_unread(name, num_layers, lambda name: set(tables[name]) == {1.0}) for name in shapes if name not in used
        }
        self.unread = {name: reason for name, reason in reasons.items() if reason is not None}
        if left := [name for name, reason in reasons.items() if reason is None]:
            raise UnsupportedModelError(
                f"transformers' {family} has no place for {some(left)}; without them it would be another model; "
                "use the model's safetensors"
            )
        self._check_shapes()

    def dtype(self, name: str) -> torch.dtype:
        is_fp32 = all(self._tensors[part].kind.name == "F32" for part in self._sources[name].parts)
        return torch.float32 if is_fp32 and ".experts." not in name else torch.bfloat16

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, index: int | None = None) -> Tensor:
        source, shape = self._sources[name], self._shapes[name]
        made = source.make(self._read_part, index)
        return made.reshape(shape if index is None else (1, *shape[1:])).to(self.dtype(name))

    def companions(self) -> list[Path]:
        """The config and the tokenizer. The tokenizer is the file's own if transformers reads it, else files in the same folder.

        Without either a warning is logged, and a text that says so takes the tokenizer's place.
        """
        from transformers import AutoTokenizer

        path = self.files[0]
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(self.folder)
        except Exception as error:  # none in the file, or not readable by transformers
            for pattern in COMPANIONS[1:]:
                for file in path.parent.glob(pattern):
                    shutil.copy(file, self.folder)
            if not has_tokenizer(self.folder):
                self._say_no_tokenizer(error)
        return super().companions()

    def _say_no_tokenizer(self, error: Exception) -> None:
        said = f"{self.files[0].name} has none that transformers {_transformers_version()} reads ({first_line(error)})"
        (self.folder / NO_TOKENIZER).write_text(said)
        _log.warning("no tokenizer: %s; put the model's tokenizer.json and tokenizer_config.json into the store", said)

    def _check_shapes(self) -> None:
        """Raises CheckpointError unless the tensors make parameters of the shapes that the metadata describes."""
        for name, source in self._sources.items():
            try:
                made = tuple(source.make(lambda part, _: torch.empty(self._tensors[part].shape, device="meta")).shape)
            except (RuntimeError, IndexError):
                made = ()
            if _without_ones(made) != _without_ones(self._shapes[name]):
                shapes = ", ".join(f"{part} {list(self._tensors[part].shape)}" for part in source.parts[:2])
                raise CheckpointError(
                    f"{shapes} cannot become {name} {list(self._shapes[name])}, the shape that its metadata describes; "
                    "download or convert it again"
                )

    def _table(self, name: str) -> list[float]:
        """A small tensor's numbers."""
        return [float(value) for value in self._read_part(name, None).flatten()]

    def _read_part(self, part: str, index: int | None) -> Tensor:
        tensor = self._tensors[part]
        data = self._bytes_of(tensor)
        data = data if index is None else data[index : index + 1]
        return torch.from_numpy(self._dequantize(data, tensor.kind).copy())

    def _bytes_of(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if tensor.file not in self._data:
            self._data[tensor.file] = np.memmap(tensor.file, np.uint8, mode="r")
        data = self._data[tensor.file][tensor.offset : tensor.offset + tensor.length]
        return data.reshape(*tensor.shape[:-1], tensor.row_bytes)


def _all_files(path: Path) -> list[Path]:
    """[``path``], or all files of the split checkpoint that it belongs to."""
    if not (split := _SPLIT.fullmatch(path.name)):
        return [path]
    suffix = path.name[-5:]
    files = [path.with_name(f"{split[1]}-{number:05}-of-{split[3]}{suffix}") for number in range(1, int(split[3]) + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{path} is one of {len(files)} files, and {some(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
            "download it into the same folder"
        )
    return files


def _check_parts(parts: list[GgufFile]) -> None:
    """Raises CheckpointError unless the files are all of one split checkpoint, in order, and no tensor stands in two."""
    owner: dict[str, Path] = {}
    for number, part in enumerate(parts):
        count, place = part.metadata.get("split.count") or 1, part.metadata.get("split.no") or 0
        if (count, place) != (len(parts), number):
            said = f"part {place + 1} of {count}" if count != 1 else "a whole file by itself"
            wanted = f"named as part {number + 1} of {len(parts)}" if len(parts) > 1 else "not named NAME-00001-of-00002.gguf"
            raise CheckpointError(f"{part.path} is {said} and {wanted}; use the names that the files were published with")
        if twice := [name for name in part.tensors if name in owner]:
            raise CheckpointError(
                f"{part.path} and {owner[twice[0]].name} both have {some(twice)}; they are not of one model: download all again"
            )
        owner |= dict.fromkeys(part.tensors, part.path)
    counts = {part.metadata["split.tensors.count"] for part in parts if part.metadata.get("split.tensors.count")}
    architectures = {part.metadata["general.architecture"] for part in parts if part.metadata.get("general.architecture")}
    if len(counts) > 1 or len(architectures) > 1 or (len(parts) > 1 and counts and counts != {len(owner)}):
        raise CheckpointError(
            f"{parts[0].path} and its other parts do not belong together: they have {len(owner)} tensors and should have "
            f"{' or '.join(str(count) for count in sorted(counts, key=str))}; download all of them again"
        )


def _architecture(fields: Mapping[str, Any]) -> str:
    kind = fields.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"it is of the type {str(kind)[:40]!r} (general.type), not a model; give the model's own file")
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError("its metadata is incomplete: general.architecture is missing; download or convert it again")
    return architecture


def _check_general(fields: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
    """The only field outside of the architecture's own that changes numbers, besides the alignment, is the blocks' version."""
    version = fields.get("general.quantization_version", _QUANTIZATION_VERSION)
    packed = [name for name, tensor in tensors.items() if tensor.kind.name not in ("F32", "F16", "BF16")]
    if packed and version != _QUANTIZATION_VERSION:
        raise UnsupportedModelError(
            f"its blocks are of version {version} (general.quantization_version), and version {_QUANTIZATION_VERSION} is read; "
            "download or convert it again"
        )


def _check_rotary(model: Any, metadata: Metadata) -> None:
    """Raises UnsupportedModelError where transformers' model turns another part of each head than the metadata says."""
    turned = metadata.count("rope.dimension_count")
    sizes = {2 * value.numel() for name, value in model.named_buffers() if name.endswith("inv_freq") and "original" not in name}
    if turned is not None and sizes and sizes != {turned}:
        raise UnsupportedModelError(
            f"its metadata turns {turned} columns of each head (rope.dimension_count), and transformers' model {sizes.pop()}; "
            "use the model's safetensors"
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)
