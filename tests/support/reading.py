"""Checkpoints read with plain safetensors, and what a store's experts should be, written without transformers' mapping."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

# Published names of one expert's gate, up and down; gpt_oss has stacks of all experts instead.
_NAMES = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}
_USUAL = ("mlp", ("gate_proj", "up_proj", "down_proj"))


def load_all(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        tensors |= load_file(path)
    return tensors


def published_expert(tensors: dict[str, torch.Tensor], family: str, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """One expert of decoder layer ``layer`` from a checkpoint's own tensors: matrices [out, in], biases [out]."""
    if family == "gpt_oss":
        prefix = f"model.layers.{layer}.mlp.experts."
        stacks = {name.removeprefix(prefix): tensor[expert] for name, tensor in tensors.items() if name.startswith(prefix)}
        return {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in stacks.items()}
    block, names = _NAMES.get(family, _USUAL)
    gate, up, down = (tensors[f"model.layers.{layer}.{block}.experts.{expert}.{name}.weight"] for name in names)
    return {"gate_up_proj": torch.cat([gate, up]), "down_proj": down}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
