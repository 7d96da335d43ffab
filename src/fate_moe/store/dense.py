"""Dense weights as a store quantizes them: which ones, how they lie, and how they are made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fate_moe.core import BlobLayout
from fate_moe.errors import CheckpointError
from fate_moe.quant.blob import views
from fate_moe.quant.planes import pack
from fate_moe.quant.solver import Solver, minmax
from fate_moe.store.format import blob_layout

__all__ = ["byte_length", "default_dense_precision", "dense_layouts", "encode_dense", "read_by_row"]

# Elements. What is smaller saves nothing that counts.
SMALLEST = 1 << 16
# Routers decide who computes: a wrong choice costs more than their bytes.
_ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
# Weights solved at a time: a solver needs several times these in fp32 (test_streaming: 87 MiB at 4096 rows of 1024, 60 at 1 << 20).
_AT_ONCE = 1 << 17


def default_dense_precision(precision: str) -> str:
    """int8 beside quantized experts: dense weights are used by every token, and few beside the experts."""
    return "lossless" if precision == "lossless" else "int8"


def dense_layouts(model: nn.Module, dense_precision: str) -> dict[str, BlobLayout]:
    """Layouts of the parameters (by name) that a store of ``model`` quantizes: matrices ``weight`` in groups of 64.

    All Linear modules but routers and small ones, and the embedding (int8 at least); not those that are tied to one another.
    """
    if dense_precision == "lossless":
        return {}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    kept = {*tied, *tied.values()}
    layouts = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if type(module) not in (nn.Linear, nn.Embedding) or path.rpartition(".")[2] in _ROUTERS or name in kept:
            continue
        shape = tuple(module.weight.shape)
        if module.weight.numel() >= SMALLEST:
            precision = "int8" if type(module) is nn.Embedding else dense_precision
            layouts[name] = blob_layout(precision, {"weight": shape}, "BF16")
    return layouts


def byte_length(layout: BlobLayout) -> int:
    """Bytes of a matrix in ``layout`` once its codes have a byte each, as a GPU has them: codes, scales and zeros."""
    rows, groups = next(part.shape for part in layout.parts if part.name == "weight.scale")
    return max(rows * groups * (layout.group_size + 4), layout.length if layout.plane_widths == (8,) else 0)


def read_by_row(model: nn.Module) -> str | None:
    """The parameter of which a forward pass needs a few rows only: the embedding, unless the head is tied to it. Or None."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if type(embedding) is not nn.Embedding or embedding.weight.numel() < SMALLEST:
        return None
    name = next(f"{path}.weight" for path, module in model.named_modules() if module is embedding)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return None if name in {*tied, *tied.values()} else name


def encode_dense(name: str, layout: BlobLayout, weight: Tensor, solver: Solver) -> Tensor:
    """The blob uint8 [layout.length] of ``weight`` [R, C]. Raises CheckpointError where it is not finite everywhere."""
    blob = torch.zeros(layout.length, dtype=torch.uint8)
    parts = views(layout, blob)
    bits = sum(layout.plane_widths)
    solve = minmax if bits == 8 else solver  # eight bits spread evenly err by 1/16 of four bits' steps: nothing to solve
    step = max(1, _AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = weight[first : first + step].float()
        if not bool(rows.isfinite().all()):
            raise CheckpointError(f"{name} is not finite everywhere; use --dense-precision lossless")
        codes, scale, zero = solve(rows, bits, layout.group_size)
        made = [scale, zero, *pack(codes, layout.group_size, layout.plane_widths)]
        kinds = ["scale", "zero", *(f"plane{i}" for i in range(len(layout.plane_widths)))]
        for kind, part in zip(kinds, made, strict=True):
            parts[f"weight.{kind}"][first : first + step].copy_(part)
    return blob
