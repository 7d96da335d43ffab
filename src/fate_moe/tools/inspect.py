"""Describes a checkpoint before its conversion: the model, the size of its store, and bounds of its speed on this machine."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fate_moe.adapter.meta_model import expert_stacks
from fate_moe.core import PRECISIONS
from fate_moe.engine.budget import AUTO_FRACTION, footprint
from fate_moe.io.direct import anonymous_buffer
from fate_moe.machine import available_memory
from fate_moe.quant.dtypes import dtype_name
from fate_moe.store.format import blob_layout
from fate_moe.store.plan import describe_model

__all__ = ["Bandwidths", "Description", "StoreEstimate", "describe", "measure_bandwidths"]

_PROBE_BYTES = 64 << 20
_READ_BYTES = 4 << 20  # the size of a typical expert


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second of memory and of the disk (None if there is no file to measure it with)."""

    memory: float
    disk: float | None


@dataclass(frozen=True)
class StoreEstimate:
    """The store at one precision.

    ``tokens_per_second`` are bounds, not measurements: with all experts read from disk, and with as many resident as memory allows.
    None if the disk was not measured or the dense weights do not fit.
    """

    expert_bytes: int
    dense_bytes: int
    store_bytes: int
    tokens_per_second: tuple[float, float] | None


@dataclass(frozen=True)
class Description:
    """What ``fate inspect`` shows of a checkpoint.

    ``layers`` counts MoE blocks; ``experts`` are those of one block. ``unread``: tensors that the model does not use, and why.
    """

    family: str
    layers: int
    experts: int
    top_k: int
    dense_bytes: int
    kv_bytes_per_token: int
    precisions: dict[str, StoreEstimate]
    bandwidths: Bandwidths
    unread: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        precisions = {
            name: {
                "expert_bytes": estimate.expert_bytes,
                "dense_bytes": estimate.dense_bytes,
                "disk_bytes": estimate.store_bytes,
                "tokens_per_second": list(estimate.tokens_per_second) if estimate.tokens_per_second else None,
            }
            for name, estimate in self.precisions.items()
        }
        return {
            "family": self.family,
            "layers": self.layers,
            "experts": self.experts,
            "top_k": self.top_k,
            "dense_bytes": self.dense_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "precisions": precisions,
            "memory_bytes_per_second": self.bandwidths.memory,
            "disk_bytes_per_second": self.bandwidths.disk,
            "unread": self.unread,
        }


def describe(checkpoint: Path, bandwidths: Bandwidths | None = None) -> Description:
    """Describe the folder ``checkpoint`` from its config.json (weights are not needed; if there are some, every tensor is
    accounted for), or a GGUF file from its metadata.

    ``bandwidths`` None: measured. Raises CheckpointError and UnsupportedModelError.
    """
    model, unread = describe_model(checkpoint)
    stacks = expert_stacks(model)
    speeds = bandwidths or measure_bandwidths(checkpoint)
    needs = footprint(model, stacks, PRECISIONS[0])
    precisions = {}
    for precision in PRECISIONS:
        lengths = {
            stack.layer: blob_layout(precision, stack.output_rows_first(), dtype_name(model.dtype)).length for stack in stacks
        }
        experts = sum(stack.num_experts * lengths[stack.layer] for stack in stacks)
        per_token = sum(min(stack.top_k, stack.num_experts) * lengths[stack.layer] for stack in stacks)
        needed = footprint(model, stacks, precision)
        dense = needed.dense_bytes + needed.row_bytes  # quantized if the experts are
        precisions[precision] = StoreEstimate(
            max(lengths.values()), dense, dense + experts, _tokens_per_second(needed.dense_bytes, per_token, experts, speeds)
        )
    return Description(
        family=needs.family,
        layers=len(stacks),
        experts=max(stack.num_experts for stack in stacks),
        top_k=max(stack.top_k for stack in stacks),
        dense_bytes=needs.dense_bytes + needs.row_bytes,
        kv_bytes_per_token=needs.kv_bytes_per_token,
        precisions=precisions,
        bandwidths=speeds,
        unread=unread,
    )


def _tokens_per_second(dense: int, per_token: int, experts: int, speeds: Bandwidths) -> tuple[float, float] | None:
    """Bounds with (every expert read from disk, as many resident as memory holds and experts chosen uniformly).

    Both read every dense byte once a token.
    """
    expert_room = available_memory() * AUTO_FRACTION - dense
    if speeds.disk is None or expert_room < per_token:
        return None
    missing = max(0.0, 1 - expert_room / experts) * per_token
    computing = (dense + per_token) / speeds.memory
    return 1 / (computing + per_token / speeds.disk), 1 / (computing + missing / speeds.disk)


def measure_bandwidths(checkpoint: Path) -> Bandwidths:
    """Measure memory reads with torch's threads, and direct reads of the checkpoint's largest file; takes under a second."""
    data = torch.ones(_PROBE_BYTES // 4)
    data.sum()
    best = min(_seconds(data.sum) for _ in range(3))
    files = [checkpoint] if checkpoint.is_file() else list(checkpoint.glob("*.safetensors"))
    files.sort(key=lambda path: path.stat().st_size)
    disk = _read_speed(files[-1]) if files and files[-1].stat().st_size >= _READ_BYTES else None
    return Bandwidths(_PROBE_BYTES / best, disk)


def _read_speed(path: Path) -> float | None:
    """Bytes per second of reads of 4 MiB from the middle of ``path`` on; None if O_DIRECT is not supported."""
    buffer: mmap.mmap = anonymous_buffer(_READ_BYTES)
    count = min(path.stat().st_size // _READ_BYTES, _PROBE_BYTES // _READ_BYTES)
    first = (path.stat().st_size // _READ_BYTES - count) // 2
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except OSError:
        return None
    try:
        spent = _seconds(lambda: [os.preadv(file, [buffer], (first + i) * _READ_BYTES) for i in range(count)])
    except OSError:
        return None
    finally:
        os.close(file)
    return count * _READ_BYTES / spent


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
