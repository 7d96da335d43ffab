"""Learned state of a model, saved in its store: fitted gates, routing statistics and the losses of shorter views.

All of it is optional and only improves choices. A file that is damaged or belongs to another model is reported once in the log and
ignored. Files are written atomically; a store on a read-only disk is left unchanged.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from fate_moe.errors import DiskSpaceError, first_line
from fate_moe.io.arrays import load_arrays
from fate_moe.io.bounded import load_json
from fate_moe.io.files import atomic_file
from fate_moe.io.tensorfile import place_tensors, read_header
from fate_moe.kernels.native import multiplies_bf16

__all__ = [
    "GATES",
    "STATISTICS",
    "VIEW_LOSSES",
    "Gates",
    "gates_bytes",
    "load_gates",
    "load_statistics",
    "load_view_losses",
    "save_gates",
    "save_statistics",
    "save_view_losses",
]

_log = logging.getLogger(__name__)

GATES = "gates.safetensors"
STATISTICS = "routing.npz"
VIEW_LOSSES = "views.json"
MAX_STATISTICS_BYTES = 64 << 20
_MOST_EXPERTS = 1 << 16  # of a layer
_MOST_LOSSES_BYTES = 1 << 20


class Gates(NamedTuple):
    """Fitted gates: affine maps, bias last, from router inputs to a layer's router logits.

    ``ahead[a - 1][layer]`` [num_experts, hidden + 1] maps the router input ``a`` layers before; None where none was fitted.
    ``forecast[layer]`` [num_experts, 2 * hidden + 1] maps the embedding and the previous token's router input; empty if not fitted.
    """

    ahead: list[list[torch.Tensor | None]]
    forecast: list[torch.Tensor]


def save_gates(store: Path, *ahead: Sequence[torch.Tensor | None], forecast: Sequence[torch.Tensor] = ()) -> Path:
    """Write fitted gates (see Gates) in bf16 and return the file. Raises OSError or DiskSpaceError if that fails."""
    path = store / GATES
    named = {_name(a, layer): w for a, weights in enumerate(ahead, 1) for layer, w in enumerate(weights) if w is not None}
    named |= {f"forecast.{layer}": weight for layer, weight in enumerate(forecast)}
    header, entries = place_tensors((name, "BF16", tuple(weight.shape)) for name, weight in named.items())
    with atomic_file(path, shared=True) as file:
        file.write(header)
        for entry in entries:
            file.write(named[entry.name].to(torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return path


def _name(ahead: int, layer: int) -> str:
    return f"layer.{layer}" if ahead == 1 else f"ahead.{ahead}.layer.{layer}"


def gates_bytes(store: Path, hidden: int) -> int:
    """Memory of the loaded gates (bf16 if the extension multiplies bf16 at this width, else fp32); 0 if there are none that fit."""
    try:
        entries = read_header(store / GATES).values()
    except (OSError, ValueError):
        return 0
    if not all(entry.dtype == "BF16" and _is_gate(entry.shape, hidden) for entry in entries):
        return 0
    return sum(entry.length for entry in entries) * (1 if multiplies_bf16(hidden) else 2)


def _is_gate(shape: tuple[int, ...], hidden: int) -> bool:
    return len(shape) == 2 and shape[0] <= _MOST_EXPERTS and shape[1] in (hidden + 1, 2 * hidden + 1)


def load_gates(store: Path, experts_per_layer: Sequence[int], hidden: int) -> Gates | None:
    """The gates that ``save_gates`` wrote, in bf16; None if there are none or they do not fit this model."""
    path = store / GATES
    if not os.path.lexists(path):
        return None
    layers = range(len(experts_per_layer))
    try:
        # The header first: what does not fit must not be in memory, which the budget does not count.
        if not all(entry.dtype == "BF16" and _is_gate(entry.shape, hidden) for entry in read_header(path).values()):
            raise ValueError("it is of another model")
        tensors = load_file(path)
        ahead: list[list[torch.Tensor | None]] = [[tensors[_name(1, layer)] for layer in layers]]
        while any(_name(len(ahead) + 1, layer) in tensors for layer in layers):
            named = [_name(len(ahead) + 1, layer) for layer in layers]
            ahead.append([tensors.get(name) for name in named])
        forecast = [tensors[f"forecast.{layer}"] for layer in layers] if "forecast.0" in tensors else []
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        _log.warning("%s cannot be read and is ignored (%s); fit the gates again with: fate fit", path, error)
        return None
    fits = [
        weight is None or (tuple(weight.shape) == (experts, width * hidden + 1) and bool(weight.isfinite().all()))
        for width, lists in ((1, ahead), (2, [forecast]))
        for weights in lists
        for experts, weight in zip(experts_per_layer, weights, strict=bool(weights))
    ]
    if not all(fits):
        _log.warning("%s does not fit this model and is ignored; fit the gates again with: fate fit", path)
        return None
    return Gates(ahead, forecast)


def save_statistics(store: Path, state: dict[str, NDArray[Any]]) -> None:
    """Save a policy's state for the next start; does nothing but log if the store cannot be written to."""
    path = store / STATISTICS
    try:
        with atomic_file(path, shared=True) as file:
            np.savez(file, **state)  # type: ignore[arg-type]
    except (OSError, DiskSpaceError) as error:
        _log.info("%s cannot be written: %s", path, error)


def load_statistics(store: Path) -> dict[str, NDArray[Any]] | None:
    """The state that ``save_statistics`` wrote; None if there is none or it cannot be read."""
    path = store / STATISTICS
    try:
        if path.stat().st_size > MAX_STATISTICS_BYTES:
            return None
        return load_arrays(path, MAX_STATISTICS_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read and is ignored (%s)", path, first_line(error))
        return None


def save_view_losses(store: Path, losses: Mapping[int, float]) -> None:
    """Save the loss in nats per token of reading every expert as a view of so many bits. Raises as ``save_gates``."""
    path = store / VIEW_LOSSES
    with atomic_file(path, shared=True) as file:
        file.write((json.dumps({"nats_lost_by_bits": {str(bits): loss for bits, loss in sorted(losses.items())}}) + "\n").encode())


def load_view_losses(store: Path) -> dict[int, float] | None:
    """The losses that ``save_view_losses`` wrote; None if there are none or they cannot be read."""
    path = store / VIEW_LOSSES
    try:
        losses = {int(bits): float(loss) for bits, loss in load_json(path, _MOST_LOSSES_BYTES)["nats_lost_by_bits"].items()}
        if not all(map(math.isfinite, losses.values())):
            raise ValueError("not finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        _log.warning("%s cannot be read and is ignored (%s); convert again with --calibrate", path, error)
        return None
    return losses
