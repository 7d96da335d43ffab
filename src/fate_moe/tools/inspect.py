"""A checkpoint before its conversion: what it is, how big its store would be, and how fast this machine could run it."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fate_moe.adapter.meta_model import build_meta_model, expert_stacks
from fate_moe.checkpoints.gguf import config_folder
from fate_moe.core import PRECISIONS
from fate_moe.engine.budget import AUTO_FRACTION, footprint
from fate_moe.io.direct import anonymous_buffer
from fate_moe.machine import available_memory
from fate_moe.quant.dtypes import dtype_name
from fate_moe.store.format import blob_layout

__all__ = ["AtPrecision", "Bandwidths", "Description", "describe", "measure_bandwidths"]

_PROBE_BYTES = 64 << 20
_READ_BYTES = 4 << 20  # as large as an expert


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second: of memory, and of the disk (None where there is no file to read)."""

    memory: float
    disk: float | None


@dataclass(frozen=True)
class AtPrecision:
    """The store at one precision. ``tokens_per_second`` are bounds, not measurements: all experts read from disk, then all resident
    (what memory allows of it); None where the disk was not measured or the dense weights do not fit."""

    expert_bytes: int
    dense_bytes: int
    store_bytes: int
    tokens_per_second: tuple[float, float] | None


@dataclass(frozen=True)
class Description:
    """A checkpoint as ``fate inspect`` describes it. ``layers`` counts MoE blocks, ``experts`` those of one block."""

    family: str
    layers: int
    experts: int
    top_k: int
    dense_bytes: int
    kv_bytes_per_token: int
    precisions: dict[str, AtPrecision]
    bandwidths: Bandwidths

    def as_dict(self) -> dict[str, Any]:
        precisions = {
            name: {
                "expert_bytes": of.expert_bytes,
                "dense_bytes": of.dense_bytes,
                "disk_bytes": of.store_bytes,
                "tokens_per_second": list(of.tokens_per_second) if of.tokens_per_second else None,
            }
            for name, of in self.precisions.items()
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
        }


def describe(checkpoint: Path, bandwidths: Bandwidths | None = None) -> Description:
    """What config.json in the folder ``checkpoint`` means (no weights are needed), or a GGUF file's own description.

    Raises CheckpointError and UnsupportedModelError.
    """
    with config_folder(checkpoint) as folder:
        model = build_meta_model(folder)
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
        of = footprint(model, stacks, precision)
        dense = of.dense_bytes + of.row_bytes  # quantized beside quantized experts
        precisions[precision] = AtPrecision(
            max(lengths.values()), dense, dense + experts, _tokens_per_second(of.dense_bytes, per_token, experts, speeds)
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
    )


def _tokens_per_second(dense: int, per_token: int, experts: int, speeds: Bandwidths) -> tuple[float, float] | None:
    """(every expert from disk, as many resident as memory holds and chosen evenly), both reading each dense byte once a token."""
    room = available_memory() * AUTO_FRACTION - dense
    if speeds.disk is None or room < per_token:
        return None
    missing = max(0.0, 1 - room / experts) * per_token
    computing = (dense + per_token) / speeds.memory
    return 1 / (computing + per_token / speeds.disk), 1 / (computing + missing / speeds.disk)


def measure_bandwidths(checkpoint: Path) -> Bandwidths:
    """Read memory with torch's threads, and the checkpoint's largest file past the page cache; together well under a second."""
    data = torch.ones(_PROBE_BYTES // 4)
    data.sum()
    best = min(_seconds(data.sum) for _ in range(3))
    files = [checkpoint] if checkpoint.is_file() else list(checkpoint.glob("*.safetensors"))
    files.sort(key=lambda path: path.stat().st_size)
    disk = _read_speed(files[-1]) if files and files[-1].stat().st_size >= _READ_BYTES else None
    return Bandwidths(_PROBE_BYTES / best, disk)


def _read_speed(path: Path) -> float | None:
    """Bytes per second of reads of 4 MiB from the middle of ``path`` on; None where O_DIRECT is refused."""
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
