"""GGUF files as a source: llama.cpp's one-file checkpoints, dequantized to bf16 tensor by tensor.

The configuration, the tokenizer and the names of dense tensors are transformers' own mapping; experts are stacked in GGUF, one
tensor for all of a layer's gate, up and down matrices each, which are joined here to what transformers' module holds.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fate_moe.errors import CheckpointError, ConfigError, UnsupportedModelError
from fate_moe.skeleton import build_skeleton
from fate_moe.store.source import Checkpoint

__all__ = ["GgufCheckpoint", "open_checkpoint"]

# llama.cpp's architectures whose experts transformers maps, by transformers' model type.
_FAMILIES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, a folder or a GGUF file. Raises CheckpointError and UnsupportedModelError."""
    return GgufCheckpoint(path) if path.is_file() else Checkpoint(path)


class GgufCheckpoint(Checkpoint):
    """A GGUF file under the names of transformers' parameters. ``folder`` is a temporary one with its config.json and tokenizer."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ConfigError(f"{path}: reading GGUF needs the gguf package; pip install 'fate-moe[gguf]'") from error
        try:
            reader = gguf.GGUFReader(path)
            architecture = str(reader.fields["general.architecture"].contents())
        except Exception as error:  # whatever a torn file makes the reader raise
            raise CheckpointError(f"{path} is no whole GGUF file ({error}); fetch it again") from error
        if architecture not in _FAMILIES:
            known = ", ".join(_FAMILIES)
            raise UnsupportedModelError(
                f"{path}: transformers has no names for the experts of GGUF's {architecture!r} (of {known})"
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize: Any = gguf.dequantize
        self.folder, self.files = Path(tempfile.mkdtemp()), [path]
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._write_companions(path)
        self._sources = self._name(_FAMILIES[architecture])
        self.names = list(self._sources)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def shape(self, name: str) -> tuple[int, ...]:
        first, *others = [tuple(int(size) for size in reversed(self._tensors[part].shape)) for part in self._sources[name]]
        return (first[0], first[1] * (1 + len(others)), *first[2:]) if others else self._as_held(name, first)

    def read(self, name: str, index: int | None = None) -> Tensor:
        parts = [self._read_part(part, index) for part in self._sources[name]]
        tensor = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return tensor.view(self._as_held(name, tuple(tensor.shape))).bfloat16()

    def _read_part(self, part: str, index: int | None) -> Tensor:
        tensor = self._tensors[part]
        data = tensor.data if index is None else tensor.data[index : index + 1]
        return torch.from_numpy(self._dequantize(data, tensor.tensor_type).copy())

    @staticmethod
    def _as_held(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shared expert's gate is a matrix of one row in transformers, and a vector in GGUF."""
        return (1, *shape) if name.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape

    def _write_companions(self, path: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        config = {**load_gguf_checkpoint(str(path))["config"], "dtype": "bfloat16"}
        # What transformers leaves to its defaults, though the tensors say it.
        for setting, part in (
            ("moe_intermediate_size", "blk.0.ffn_gate_exps.weight"),
            ("shared_expert_intermediate_size", "blk.0.ffn_gate_shexp.weight"),
            ("vocab_size", "token_embd.weight"),
        ):
            if part in self._tensors:
                config[setting] = int(self._tensors[part].shape[1])
        (self.folder / "config.json").write_text(json.dumps(config, default=_plain))
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(self.folder)
        except Exception:  # a file without a tokenizer, or with one that transformers does not read: run says so
            return

    def _name(self, family: str) -> dict[str, list[str]]:
        """GGUF's names by the parameter that they become; gate and up become one."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

        processor = TENSOR_PROCESSORS[family.replace("_", "")](config={})
        mapping = get_gguf_hf_weights_map(build_skeleton(self.folder), processor)
        sources: dict[str, list[str]] = {}
        for part in sorted(self._tensors):  # gate before up
            name = mapping.get(part) or mapping.get(part.removesuffix(".weight"))
            if name is not None:
                sources.setdefault(name, []).append(part)
        return sources


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else list(value)
