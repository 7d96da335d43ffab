"""Dense weights from a store into a meta_model: as they lie, or as numbers on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.contract import is_experts
from fate_moe.core import BlobLayout, Patcher
from fate_moe.errors import StoreError
from fate_moe.kernels.reference import dequantize
from fate_moe.layers.dense import QuantizedGroups, QuantizedLinear, quantized_weight, stored_weight
from fate_moe.quant.blob import views
from fate_moe.store.dense import one_product, tied_modules
from fate_moe.store.format import AGAIN
from fate_moe.store.open import Store
from fate_moe.store.rows import StoredRows

__all__ = ["fill", "fill_device", "leave_on_disk"]

# Elements of a quantized matrix that become numbers at a time: in fp32, with copies, about 16 bytes each (16 Mi of them ran a GPU's
# smallest budget out of memory).
_AT_ONCE = 1 << 20


def fill(
    model: Any, dense: dict[str, torch.Tensor], path: Path, quantized: dict[str, BlobLayout], exact: bool, patcher: Patcher
) -> None:
    """Put every dense tensor where the meta_model has its placeholder, and a module of ours where it is ``quantized``; no copies.

    An embedding keeps its module and gets a weight of ours. Modules that are tied share the blob and the weight. ``path`` is the
    store's. Raises StoreError where they do not belong together.
    """
    blobs = _place(model, dense, path, quantized, patcher)
    for module_name, blob in blobs.items():
        old, layout = model.get_submodule(module_name), quantized[f"{module_name}.weight"]
        weight = quantized_weight(blob, layout, (int(old.weight.shape[0]), int(old.weight.shape[1])), model.dtype)
        for name in tied_modules(model, f"{module_name}.weight"):
            module = model.get_submodule(name)
            if isinstance(module, nn.Embedding):
                patcher.replace(module, "weight", weight)
            else:
                kind = QuantizedLinear if type(module) is nn.Linear else QuantizedGroups
                _put(model, name, kind(blob, layout, weight, module, exact), patcher)
    _finish(model, path, patcher)


def fill_device(
    model: Any,
    dense: dict[str, torch.Tensor],
    path: Path,
    quantized: dict[str, BlobLayout],
    device: torch.device,
    patcher: Patcher,
) -> None:
    """The same on ``device``: ``quantized`` matrices of plain Linear modules take one byte a weight there; all others, embeddings
    and what is tied, become numbers of the model's dtype. The largest first, so that no more is ever on the device than in the end,
    and a small blob."""
    from fate_moe.gpu.dense import ByteLinear  # Triton's

    there = {name: tensor if tensor.dtype == torch.uint8 else tensor.to(device) for name, tensor in dense.items()}
    blobs = _place(model, there, path, quantized, patcher)
    for module_name, blob in sorted(blobs.items(), key=lambda item: -len(item[1])):
        old, layout, there_blob = model.get_submodule(module_name), quantized[f"{module_name}.weight"], blob.to(device)
        if not one_product(model, f"{module_name}.weight"):
            weight = _expanded(there_blob, layout, old.weight.shape, model.dtype)
            patcher.replace(old, "weight", nn.Parameter(weight, requires_grad=False))
            continue
        shape = (int(old.weight.shape[0]), int(old.weight.shape[1]))
        _put(model, module_name, ByteLinear.from_blob(there_blob, layout, shape, old.bias, model.dtype), patcher)
    for module in model.modules():
        for leaf, value in list(module._buffers.items()):
            if value is not None and value.device != device:
                patcher.replace(module, leaf, value.to(device))
    _finish(model, path, patcher)


def _expanded(blob: torch.Tensor, layout: BlobLayout, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The matrix ``shape`` that ``blob`` holds, on the blob's device."""
    parts = views(layout, blob)
    planes = [parts[f"weight.plane{i}"] for i in range(len(layout.plane_widths))]
    made = torch.empty(shape, dtype=dtype, device=blob.device)
    step = max(1, _AT_ONCE // shape[1])
    for first in range(0, shape[0], step):
        rows = slice(first, first + step)
        made[rows] = dequantize(
            [plane[rows] for plane in planes],
            parts["weight.scale"][rows],
            parts["weight.zero"][rows],
            cols=shape[1],
            group_size=layout.group_size,
            widths=layout.plane_widths,
        )
    return made


def _place(
    model: Any, dense: dict[str, torch.Tensor], path: Path, quantized: dict[str, BlobLayout], patcher: Patcher
) -> dict[str, torch.Tensor]:
    """Put the tensors of ``dense`` that are numbers into ``model``; the others, blobs, by the name of their module."""
    modules = dict(model.named_modules())
    blobs: dict[str, torch.Tensor] = {}
    for name, tensor in dense.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = modules.get(owner_name, nn.Module())
        placeholder = owner._buffers.get(leaf, owner._parameters.get(leaf))
        if placeholder is None:
            raise StoreError(f"{path}: dense.safetensors has {name}, which the model does not have; {AGAIN}")
        if name in quantized and tensor.dtype == torch.uint8 and len(tensor) == quantized[name].length:
            blobs[owner_name] = tensor  # once its bias is there
            continue
        if placeholder.shape != tensor.shape:
            found, wanted = tuple(tensor.shape), tuple(placeholder.shape)
            raise StoreError(f"{path}: {name} is {found} in dense.safetensors, config.json means {wanted}; {AGAIN}")
        patcher.replace(owner, leaf, tensor if leaf in owner._buffers else nn.Parameter(tensor, requires_grad=False))
    return blobs


def _finish(model: Any, path: Path, patcher: Patcher) -> None:
    """Tie what is tied; raise StoreError if a parameter that is no expert's has no numbers."""
    patcher.record(model.tie_weights)
    experts = {module for module in model.modules() if is_experts(module)}
    for module_name, module in model.named_modules():
        for leaf, value in module._parameters.items():
            if value is not None and value.device.type == "meta" and module not in experts:
                raise StoreError(f"{path}: dense.safetensors lacks {module_name}.{leaf}; {AGAIN}")


def _put(model: Any, path: str, module: nn.Module, patcher: Patcher) -> None:
    """``module`` in place of the one at ``path``."""
    parent, _, name = path.rpartition(".")
    patcher.replace(model.get_submodule(parent), name, module)


def leave_on_disk(model: Any, parameter: str, store: Store, layout: BlobLayout | None, patcher: Patcher) -> None:
    """Let the embedding with this ``parameter`` read its tokens' rows when they come."""
    embedding = model.get_submodule(parameter.rpartition(".")[0])
    shape = (int(embedding.weight.shape[0]), int(embedding.weight.shape[1]))
    patcher.replace(embedding, "weight", stored_weight(StoredRows(store, parameter, shape, layout), shape, model.dtype))
