"""Converts a Hugging Face checkpoint into an expert store, one tensor and one expert at a time.

All work happens in DST.partial, where each file is complete or absent and a journal lists the finished ones. The folder is renamed
to DST once everything in it is on the disk. A killed conversion therefore continues, and its store has the same bytes as one that
was never interrupted.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import xxhash
from torch import Tensor

from fate_moe.checkpoints.gguf import open_checkpoint
from fate_moe.checkpoints.source import resolve_checkpoint
from fate_moe.core import PRECISIONS
from fate_moe.errors import CheckpointError, ConfigError, DiskSpaceError, StoreError, first_line
from fate_moe.io.files import Journal, atomic_file, locked_folder, require_space, sync_folder
from fate_moe.io.progress import Advance, progress_bar
from fate_moe.kernels.modes import neutral
from fate_moe.quant.blob import encode
from fate_moe.quant.choices import GROUP_SIZES
from fate_moe.quant.dtypes import dtype_name
from fate_moe.quant.solver import DEFAULT_SOLVER, SOLVERS, Solver
from fate_moe.store.dense import default_dense_precision
from fate_moe.store.format import FORMAT_VERSION, ExpertEntry, LayerEntry, Manifest
from fate_moe.store.identity import StoreOptions, older_identity, store_identity
from fate_moe.store.mixed_precision import PrecisionRules
from fate_moe.store.open import open_store
from fate_moe.store.plan import ConversionPlan, ShardPlan, check_finite, plan_conversion, tensor_bytes

__all__ = ["Moments", "convert", "write_store"]

_log = logging.getLogger(__name__)


class Moments(Protocol):
    """Second moments of the experts' inputs, measured on a text; ``digest`` identifies the text."""

    digest: str

    def moments(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Second moments fp32 [in, in] of the inputs of an expert with parameters ``tensors``, by matrix name."""


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _in_one_line(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """What the operating system refuses becomes one of our errors."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            kind = DiskSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
            raise kind(
                f"the conversion stopped ({where}{error.strerror or first_line(error)}); check the disk and its permissions, then "
                "run the same command again, it continues"
            ) from error

    return call


@_in_one_line
@neutral()
def convert(
    source: str | Path,
    destination: str | Path,
    precision: str = "lossless",
    *,
    solver: str = DEFAULT_SOLVER,
    group_size: int = 64,
    dense_precision: str | None = None,
    precision_rules: PrecisionRules | None = None,
    calibration: Moments | None = None,
    progress: bool | None = None,
) -> Path:
    """Convert the checkpoint ``source`` (a folder, a GGUF file or a hub id) into the store ``destination`` and return its path.

    Peak memory stays near the largest single tensor (for families whose conversion mixes experts, near one layer's stack).
    A killed conversion continues when called again; a second conversion to the same place waits for the first. A complete store of
    the same source at ``destination`` is left unchanged. ``solver`` and ``group_size`` apply to quantized precisions.
    ``precision_rules`` set other precisions for layers or single experts. ``calibration`` gives the inputs for which codes are
    chosen. ``dense_precision`` is that of all other matrices (None: int8 if ``precision`` is quantized). ``progress`` draws a bar
    on stderr (None: if stderr is a terminal).

    Raises CheckpointError or UnsupportedModelError for the source, StoreError when ``destination`` holds something else,
    DiskSpaceError when the store does not fit, ConfigError for an unknown precision, solver or group size.
    """
    dense = dense_precision or default_dense_precision(precision)
    rules = [("precision", value, PRECISIONS) for value in (precision_rules or {}).values()]
    for name, value, choices in (
        *rules,
        ("precision", precision, PRECISIONS),
        ("dense_precision", dense, PRECISIONS),
        ("solver", solver, tuple(SOLVERS)),
        ("group_size", group_size, GROUP_SIZES),
    ):
        if value not in choices:
            raise ConfigError(f"{name} {value!r} is not one of {', '.join(map(str, choices))}")
    folder, destination = resolve_checkpoint(source), Path(destination)
    if (folder / "fate.json").exists():
        raise CheckpointError(f"{folder} is already an expert store; give the checkpoint it was made from")
    checkpoint = open_checkpoint(folder)
    digest = calibration.digest if calibration else ""
    options = StoreOptions(precision, dense, solver, group_size, precision_rules, digest)
    if _is_complete(destination, older_identity(checkpoint, options)):
        return destination
    if not _is_vacant(destination) and _is_done(destination, store_identity(checkpoint, options, progress)):
        return destination
    plan = plan_conversion(checkpoint, precision, group_size, dense, precision_rules)  # first: it refuses before all bytes are read
    return write_store(plan, destination, options, source, calibration=calibration, progress=progress)


@_in_one_line
@neutral()
def write_store(
    plan: ConversionPlan,
    destination: Path,
    options: StoreOptions,
    source: str | Path,
    *,
    calibration: Moments | None = None,
    progress: bool | None = None,
) -> Path:
    """Carry out ``plan``, which was made with ``options``; ``source`` is what ``convert`` was given. Otherwise as ``convert``."""
    identity = store_identity(plan.checkpoint, options, progress)
    if _is_done(destination, identity):
        return destination
    work = destination.with_name(destination.name + ".partial")
    with locked_folder(work):
        if _is_done(destination, identity):  # the conversion that held the lock wrote it
            work.rmdir()
            return destination
        if not _is_complete(work, identity):
            title = str(source) if not Path(source).is_dir() else Path(source).resolve().name
            try:
                _fill(work, plan, title, options, calibration, identity, progress)
            except CheckpointError:  # no further attempt can succeed
                _discard(work, plan)
                raise
            except DiskSpaceError:
                if not any(work.iterdir()):
                    work.rmdir()
                raise
        for leftover in (work / "journal.json", *work.glob("*.tmp")):
            leftover.unlink(missing_ok=True)
        sync_folder(work)
        os.rename(work, destination)
        sync_folder(destination.parent)
    return destination


def _is_done(destination: Path, identity: str) -> bool:
    """Whether ``destination`` is already this store. Raises StoreError if it is neither this store nor an empty folder."""
    if _is_vacant(destination):
        return False
    if not _is_complete(destination, identity):
        raise StoreError(f"{destination} exists and is not a complete store of this checkpoint; delete it or choose another folder")
    return True


def _is_vacant(destination: Path) -> bool:
    return not os.path.lexists(destination) or (destination.is_dir() and not any(destination.iterdir()))


def _is_complete(folder: Path, identity: str) -> bool:
    try:
        return open_store(folder).manifest.identity == identity
    except StoreError:
        return False


def _discard(work: Path, plan: ConversionPlan) -> None:
    """Delete what ``_fill`` has written; what else lies in the folder stays, and the folder with it."""
    names = ["dense.safetensors", *(shard.name for shard in plan.shards), "fate.json"]
    names += [path.name for path in plan.checkpoint.companions()]
    for name in [*names, "journal.json"]:  # the journal last: by it an unfinished conversion is known
        for path in (work / f"{name}.tmp", work / name):
            path.unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()


def _fill(
    work: Path,
    plan: ConversionPlan,
    title: str,
    options: StoreOptions,
    calibration: Moments | None,
    identity: str,
    progress: bool | None,
) -> None:
    journal, solver = Journal(work, identity), SOLVERS[options.solver]
    copied = {path.name: plan.checkpoint.read_companion(path) for path in plan.checkpoint.companions()}
    sizes = {"dense.safetensors": plan.dense_bytes} | {shard.name: shard.num_bytes for shard in plan.shards}
    remaining = sum(num_bytes for name, num_bytes in sizes.items() if journal.finished(name) is None)
    # Besides the tensors: copied files, fate.json and the journal. The last two grow by less than 128 bytes per expert.
    num_experts = sum(len(shard.blobs) for shard in plan.shards)
    require_space(work, remaining + sum(map(len, copied.values())) + 3 * 128 * num_experts + (1 << 20))
    with progress_bar("converting", sum(sizes.values()), progress) as advance:
        dense_checksum = journal.finished("dense.safetensors")
        if dense_checksum is None or (work / "dense.safetensors").stat().st_size != plan.dense_bytes:  # begun by another version
            dense_checksum = _write_dense(work / "dense.safetensors", plan, solver, advance)
            journal.record("dense.safetensors", dense_checksum)
        else:
            advance(plan.dense_bytes, "dense weights")
        checksums = []
        for shard in plan.shards:
            remark = f"layer {shard.stack.layer + 1}/{len(plan.shards)}"
            if (shard_checksums := journal.finished(shard.name)) is None:
                shard_checksums = _write_shard(work / shard.name, plan, shard, solver, calibration, partial(advance, remark=remark))
                journal.record(shard.name, shard_checksums)
            else:
                advance(shard.num_bytes, remark)
            checksums.append(shard_checksums)
    for name, data in copied.items():
        with atomic_file(work / name) as file:
            file.write(data)
    manifest = _manifest(plan, title, options.dense, identity, dense_checksum, checksums)
    with atomic_file(work / "fate.json") as file:
        file.write(manifest.to_json().encode())


def _write_dense(path: Path, plan: ConversionPlan, solver: Solver, advance: Advance) -> str:
    """Write dense.safetensors and return the checksum of all its bytes."""
    digest = xxhash.xxh3_64(plan.dense_header)
    with atomic_file(path) as file:
        file.write(plan.dense_header)
        advance(len(plan.dense_header), "dense weights")
        for tensor in plan.dense:
            data = tensor_bytes(plan.make_dense(tensor, solver))
            digest.update(data)
            file.write(data)
            advance(len(data), "dense weights")
    return digest.hexdigest()


def _write_shard(
    path: Path,
    plan: ConversionPlan,
    shard: ShardPlan,
    solver: Solver,
    calibration: Moments | None,
    advance: Callable[[int], None],
) -> list[list[str]]:
    """Write one layer's shard and return, for each expert, the checksums of its sections."""
    checksums: list[list[str]] = []
    stacked: dict[str, Tensor] = {}
    with atomic_file(path) as file:
        file.write(shard.header)
        advance(len(shard.header))
        for expert in range(shard.stack.num_experts):
            tensors = plan.make_expert(shard.stack, expert, stacked)
            layout = shard.layouts[expert]
            for name, tensor in tensors.items():
                check_finite(tensor, f"{shard.stack.name}.{name} expert {expert}")
            moments = calibration.moments(shard.stack.layer, expert, tensors) if calibration and layout.plane_widths else None
            quantized = plan.make_quantized(shard.stack, expert) if layout.plane_widths else None
            blob = memoryview(encode(layout, tensors, solver, moments, quantized))
            checksums.append([xxhash.xxh3_64_hexdigest(blob[s.offset : s.offset + s.length]) for s in layout.sections])
            file.write(blob)
            advance(len(blob))
    return checksums


def _manifest(
    plan: ConversionPlan, title: str, dense: str, identity: str, dense_checksum: str, checksums: list[list[list[str]]]
) -> Manifest:
    layouts = tuple(dict.fromkeys(layout for shard in plan.shards for layout in shard.layouts))
    layers = tuple(
        LayerEntry(
            shard.stack.name,
            shard.name,
            tuple(layouts.index(layout) for layout in shard.layouts),
            tuple(ExpertEntry(blob.offset, tuple(sums)) for blob, sums in zip(shard.blobs, shard_checksums, strict=True)),
        )
        for shard, shard_checksums in zip(plan.shards, checksums, strict=True)
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        source=title,
        family=plan.model.config.model_type,
        precision=Counter(layout.precision for shard in plan.shards for layout in shard.layouts).most_common(1)[0][0],
        dtype=dtype_name(plan.dtype),
        layouts=layouts,
        layers=layers,
        dense_bytes=plan.dense_bytes,
        dense_checksum=dense_checksum,
        shard_bytes={shard.name: shard.num_bytes for shard in plan.shards},
        identity=identity,
        dense_precision=dense,
        unread=plan.unread,
    )
