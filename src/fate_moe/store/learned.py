"""What was learned about a model's routing, kept beside its store: fitted gates and routing statistics.

Neither is needed, both only make reading ahead and eviction better: a file that is damaged or of another model is said so once and
left alone. Written atomically; a store that cannot be written to stays as it is.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

__all__ = ["GATES", "STATISTICS", "gates_bytes", "load_gates", "load_statistics", "save_gates", "save_statistics"]

_log = logging.getLogger(__name__)

GATES = "gates.safetensors"
STATISTICS = "routing.npz"
MAX_STATISTICS_BYTES = 64 << 20


def save_gates(store: Path, weights: Sequence[torch.Tensor]) -> Path:
    """Write one matrix [num_experts, hidden + 1] a layer; returns the file. Raises OSError if the store cannot be written to."""
    path = store / GATES
    part = path.with_suffix(".part")
    save_file({f"layer.{layer}": weight.to(torch.bfloat16).contiguous() for layer, weight in enumerate(weights)}, part)
    os.replace(part, path)
    return path


def gates_bytes(store: Path) -> int:
    """Memory that the gates take once loaded (fp32), 0 where there are none."""
    path = store / GATES
    return 2 * path.stat().st_size if path.is_file() else 0


def load_gates(store: Path, experts_per_layer: Sequence[int], hidden: int) -> list[torch.Tensor] | None:
    """The matrices of ``save_gates`` in fp32; None where there are none that fit."""
    path = store / GATES
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        weights = [tensors[f"layer.{layer}"].float() for layer in range(len(experts_per_layer))]
    except (OSError, KeyError, SafetensorError) as error:
        _log.warning("%s cannot be used (%s); fit the gates again with: fate fit", path, error)
        return None
    shapes = [(num_experts, hidden + 1) for num_experts in experts_per_layer]
    if [tuple(weight.shape) for weight in weights] != shapes or not all(bool(weight.isfinite().all()) for weight in weights):
        _log.warning("%s is of another model or damaged; fit the gates again with: fate fit", path)
        return None
    return weights


def save_statistics(store: Path, state: dict[str, NDArray[Any]]) -> None:
    """Keep a policy's state for the next start, if the store can be written to."""
    path = store / STATISTICS
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, **state)  # type: ignore[arg-type]
        os.replace(part, path)
    except OSError as error:
        _log.info("%s is not kept: %s", path, error)
        part.unlink(missing_ok=True)


def load_statistics(store: Path) -> dict[str, NDArray[Any]] | None:
    """What ``save_statistics`` kept; None where there is none that can be read."""
    path = store / STATISTICS
    try:
        if path.stat().st_size > MAX_STATISTICS_BYTES:
            return None
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        _log.warning("%s cannot be read (%s) and is not used", path, error)
        return None
