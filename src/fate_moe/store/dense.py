"""Dense weights in a store: which are quantized, their layouts, and how they are encoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fate_moe.core import BlobLayout
from fate_moe.quant.blob import views
from fate_moe.quant.planes import pack
from fate_moe.quant.solver import Solver, minmax
from fate_moe.store.format import blob_layout

__all__ = ["byte_length", "default_dense_precision", "dense_layouts", "encode_dense", "row_read_parameter"]

# Smaller matrices stay lossless: quantizing them would save too little memory to matter.
MIN_QUANTIZED_ELEMENTS = 1 << 16
# Router modules, by transformers' names. They stay lossless: a wrongly chosen expert costs more than their bytes.
_ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
# Weights solved at a time. A solver needs several times as much in fp32; chosen by peak memory (tests/store/test_streaming.py).
_CHUNK = 1 << 17


def default_dense_precision(precision: str) -> str:
    """int8 if the experts are quantized: every token uses the dense weights, and they are small compared with the experts."""
    return "lossless" if precision == "lossless" else "int8"


def dense_layouts(model: nn.Module, dense_precision: str) -> dict[str, BlobLayout]:
    """Layouts, by name, of the parameters that a store of ``model`` quantizes: matrices ``weight`` in groups of 64.

    These are all Linear modules except routers and small ones, and the embedding (always int8). Tied parameters are not quantized.
    """
    if dense_precision == "lossless":
        return {}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied_names = {*tied, *tied.values()}
    layouts = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if type(module) not in (nn.Linear, nn.Embedding) or path.rpartition(".")[2] in _ROUTERS or name in tied_names:
            continue
        shape = tuple(module.weight.shape)
        if module.weight.numel() >= MIN_QUANTIZED_ELEMENTS:
            precision = "int8" if type(module) is nn.Embedding else dense_precision
            layouts[name] = blob_layout(precision, {"weight": shape}, "BF16")
    return layouts


def byte_length(layout: BlobLayout) -> int:
    """Bytes of a matrix in ``layout`` with one byte per code, as on a GPU: codes, scales and zeros."""
    rows, groups = next(part.shape for part in layout.parts if part.name == "weight.scale")
    return max(rows * groups * (layout.group_size + 4), layout.length if layout.plane_widths == (8,) else 0)


def row_read_parameter(model: nn.Module) -> str | None:
    """The name of the embedding's parameter if a forward pass needs only the rows of its tokens; None if it is small or tied."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if type(embedding) is not nn.Embedding or embedding.weight.numel() < MIN_QUANTIZED_ELEMENTS:
        return None
    name = next(f"{path}.weight" for path, module in model.named_modules() if module is embedding)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return None if name in {*tied, *tied.values()} else name


def encode_dense(layout: BlobLayout, weight: Tensor, solver: Solver) -> Tensor:
    """The blob uint8 [layout.length] of ``weight`` [R, C], all of it finite."""
    blob = torch.zeros(layout.length, dtype=torch.uint8)
    parts = views(layout, blob)
    bits = sum(layout.plane_widths)
    solve = minmax if bits == 8 else solver  # an 8-bit step is 1/17 of a 4-bit step: nothing to gain from a solver
    step = max(1, _CHUNK // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = weight[first : first + step].float()
        codes, scale, zero = solve(rows, bits, layout.group_size)
        encoded = [scale, zero, *pack(codes, layout.group_size, layout.plane_widths)]
        kinds = ["scale", "zero", *(f"plane{i}" for i in range(len(layout.plane_widths)))]
        for kind, part in zip(kinds, encoded, strict=True):
            parts[f"weight.{kind}"][first : first + step].copy_(part)
    return blob
