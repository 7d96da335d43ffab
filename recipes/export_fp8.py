"""Convert a bf16 checkpoint to DeepSeek-V3's block-scaled FP8, half the size.

    python recipes/export_fp8.py --model MODEL --out FOLDER

Each matrix W becomes ``W`` in e4m3 and ``W_scale_inv`` in fp32, one for each block of 128 x 128 (blocks at the edges may be
smaller), such that the block's largest magnitude becomes 448, the maximum of e4m3. Small or sensitive tensors stay bf16: routers,
norms, embeddings, lm_head, biases. Shapes below: R rows, C columns.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fate_moe.checkpoints.source import COMPANIONS, Checkpoint
from fate_moe.errors import CheckpointError, FateError

__all__ = ["export", "main", "quantize"]

BLOCK = 128
SHARD_BYTES = 15 << 20  # small enough for a code repository
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_UNQUANTIZED = re.compile(r"(^|\.)(embed_\w+|wte|wpe|lm_head|gate|router|shared_expert_gate|\w*norm\w*)\.weight$")
_COPIED = (*COMPANIONS, "README*", "LICENSE*")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes e4m3 [R, C] and scales fp32 [ceil(R / 128), ceil(C / 128)] of ``weight`` [R, C]: weight is about code * scale."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK)  # [R / 128, 128, C / 128, 128]
    scale = blocks.abs().amax(dim=(1, 3)) / _E4M3_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (blocks / scale[:, None, :, None]).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1)[:rows, :cols].contiguous(), scale


def export(model: Path, out: Path) -> Path:
    """Write ``out``, complete or not at all.

    Raises CheckpointError when ``model`` cannot be read or is already quantized, or when ``out`` exists.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists; delete it or choose another folder")
    if not model.is_dir():
        raise CheckpointError(f"{model} is not a folder; give the folder of a Hugging Face checkpoint")
    checkpoint = Checkpoint(model)
    config = json.loads((model / "config.json").read_bytes())
    if config.get("quantization_config"):
        raise CheckpointError(f"{model} is already quantized; give the bf16 checkpoint it was made from")
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_weights(checkpoint, work)
        for path in sorted({path for pattern in _COPIED for path in model.glob(pattern) if path.is_file()}):
            shutil.copyfile(path, work / path.name)
        (work / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        work.chmod(0o755)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out


def _write_weights(checkpoint: Checkpoint, folder: Path) -> None:
    shards = _shard_names(checkpoint)
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: tensor for name in names for key, tensor in _export_tensor(checkpoint, name)}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        (folder / shard).chmod(0o644)  # the safetensors package creates private files, mkdtemp a private folder
        weight_map |= dict.fromkeys(tensors, shard)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _export_tensor(checkpoint: Checkpoint, name: str) -> Iterator[tuple[str, Tensor]]:
    """The exported tensors, with their names, of the tensor ``name``."""
    tensor = checkpoint.read(name)
    if not _is_quantized(checkpoint, name):
        yield name, tensor
        return
    if not tensor.isfinite().all():
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has infinite or NaN weights, which e4m3 cannot represent; use the bf16 checkpoint"
        )
    yield from zip((name, f"{name}_scale_inv"), quantize(tensor), strict=True)


def _shard_names(checkpoint: Checkpoint) -> list[list[str]]:
    """The tensor names of each shard. A shard has at most SHARD_BYTES; a larger tensor gets its own."""
    shards: list[list[str]] = []
    room = 0
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        if _is_quantized(checkpoint, name):
            rows, cols = shape
            num_bytes = rows * cols + 4 * -(-rows // BLOCK) * -(-cols // BLOCK)
        else:
            num_bytes = torch.Size(shape).numel() * checkpoint.dtype(name).itemsize
        num_bytes += 2 * (len(name.encode()) + 128)  # at most, in the header
        if num_bytes > room:
            shards.append([])
            room = SHARD_BYTES - 1024
        shards[-1].append(name)
        room -= num_bytes
    return shards


def _is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether ``name`` is a matrix to be quantized. Raises CheckpointError for stacks of matrices."""
    shape = checkpoint.shape(name)
    if len(shape) > 2 and checkpoint.dtype(name).is_floating_point:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has {len(shape)} dimensions; give a checkpoint with one tensor for each matrix"
        )
    return len(shape) == 2 and name.endswith(".weight") and not _UNQUANTIZED.search(name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="a bf16 checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        out = export(arguments.model, arguments.out)
    except (FateError, OSError) as error:
        print(f"export_fp8: {error}", file=sys.stderr)
        return 1
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {num_bytes / 1e6:.1f} MB in {len(list(out.glob('*.safetensors')))} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
