"""Checkpoints with something changed in their tensors, configuration or files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fate_moe.checkpoints.gguf import open_checkpoint
from fate_moe.store.plan import ConversionPlan, plan_conversion
from tests.support.reading import load_all

__all__ = ["Tensors", "altered", "change_tensors", "edit_json", "plan_of", "rewritten"]

Tensors = dict[str, torch.Tensor]


def altered(folder: Path, out: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> Path:
    """A copy of the checkpoint ``folder`` as one file at ``out`` (returned), with ``change`` made to its tensors.

    ``config``: entries of config.json to set; None deletes one.
    """
    tensors = load_all(folder)
    change(tensors)
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    shutil.copy(folder / "config.json", out)
    edit_json(out / "config.json", lambda data: data.update(config))
    return out


def rewritten(folder: Path, out: Path, rename: Callable[[str], str]) -> Path:
    """A copy of ``folder`` at ``out`` with other tensor names."""

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return altered(folder, out, change)


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of one safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file; entries that are None are deleted."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def plan_of(folder: Path) -> ConversionPlan:
    """The plan of a lossless conversion."""
    return plan_conversion(open_checkpoint(folder), "lossless")
