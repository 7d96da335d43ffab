"""GGUF files, the checkpoints of llama.cpp, as a source: one file or several, dequantized tensor by tensor.

Experts become bf16 whatever their type; tensors that are F32 in the file (norms, routers, biases) stay fp32.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fate_moe.adapter.meta_model import build_meta_model
from fate_moe.checkpoints.gguf_config import build_config, find_model_type
from fate_moe.checkpoints.gguf_names import find_sources
from fate_moe.checkpoints.source import COMPANIONS, Checkpoint
from fate_moe.errors import CheckpointError, ConfigError, UnsupportedModelError

__all__ = ["GgufCheckpoint", "config_folder", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, a folder or a GGUF file. Raises CheckpointError and UnsupportedModelError."""
    return GgufCheckpoint(path) if path.is_file() else Checkpoint(path)


@contextmanager
def config_folder(path: Path) -> Iterator[Path]:
    """The folder with the config.json of the checkpoint at ``path``. For a GGUF file it is temporary and lasts for the context."""
    checkpoint = GgufCheckpoint(path) if path.is_file() else None
    yield checkpoint.folder if checkpoint else path


class GgufCheckpoint(Checkpoint):
    """A GGUF file with transformers' parameter names. ``folder`` is temporary and holds config.json and the tokenizer."""

    def __init__(self, path: Path) -> None:
        """Reads everything except the weights. Raises CheckpointError for damaged files and missing files of a split checkpoint,
        UnsupportedModelError for an architecture that is not supported, ConfigError if the gguf package is not installed."""
        try:
            import gguf
        except ImportError as error:
            raise ConfigError(f"{path}: reading GGUF needs the gguf package; pip install 'fate-moe[gguf]'") from error
        self.files = _all_files(path)
        try:
            readers = [gguf.GGUFReader(file) for file in self.files]
            fields = readers[0].fields.items()  # without the vocabulary, which takes seconds to read
            metadata = {
                name: field.contents() for name, field in fields if not name.startswith("tokenizer.") or name.endswith("_id")
            }
            architecture = str(metadata["general.architecture"])
        except Exception as error:  # the reader raises many types for damaged files
            raise CheckpointError(f"{path} is not a complete GGUF file ({error}); download it again") from error
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        self._dequantize: Any = gguf.dequantize
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()}
        metadata = {name.removeprefix(f"{architecture}."): value for name, value in metadata.items()}
        try:
            config = build_config(find_model_type(architecture, metadata, shapes), metadata, shapes)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{path}: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path}: its metadata does not describe a model ({error!r}); download it again") from error
        (self.folder / "config.json").write_text(json.dumps(config))
        model = build_meta_model(self.folder)
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._sources = find_sources(model, architecture, self._tensors)
        self.names = list(self._sources)

    def dtype(self, name: str) -> torch.dtype:
        is_fp32 = all(self._tensors[part].tensor_type.name == "F32" for part in self._sources[name].parts)
        return torch.float32 if is_fp32 and ".experts." not in name else torch.bfloat16

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, index: int | None = None) -> Tensor:
        source, shape = self._sources[name], self._shapes[name]
        try:
            tensor = source.join([self._read_part(part, index) for part in source.parts])
            return tensor.reshape(shape if index is None else (1, *shape[1:])).to(self.dtype(name))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            types = ", ".join(f"{part} ({self._tensors[part].tensor_type.name})" for part in source.parts)
            raise CheckpointError(f"{self.files[0]}: {types} cannot become {name} {shape} ({error}); download it again") from error

    def companions(self) -> list[Path]:
        """The config and the tokenizer. The tokenizer is the file's own if transformers reads it, else files in the same folder."""
        from transformers import AutoTokenizer

        path = self.files[0]
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(self.folder)
        except Exception:  # none in the file, or not readable by transformers: `fate run` reports it
            for pattern in COMPANIONS[1:]:
                for file in path.parent.glob(pattern):
                    shutil.copy(file, self.folder)
        return super().companions()

    def _read_part(self, part: str, index: int | None) -> Tensor:
        tensor = self._tensors[part]
        data = tensor.data if index is None else tensor.data[index : index + 1]
        return torch.from_numpy(self._dequantize(data, tensor.tensor_type).copy())


def _all_files(path: Path) -> list[Path]:
    """[``path``], or all files of the split checkpoint that it belongs to."""
    split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not split:
        return [path]
    files = [path.with_name(f"{split[1]}-{number:05}-of-{split[2]}.gguf") for number in range(1, int(split[2]) + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path} is one of {len(files)} files, and {missing[0]} is missing; download it into the same folder")
    return files
