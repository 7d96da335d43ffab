"""Weights and norms as the extension knows them, and when two results count as the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from fate_moe.kernels.cpu import SMALL
from fate_moe.kernels.gradients import flows, refuse_transforms
from fate_moe.kernels.native import BF16, DTYPES, F32, native
from fate_moe.kernels.plain_layer import Norm
from fate_moe.layers.dense import MAX_ROWS, QuantizedLinear

__all__ = [
    "MOST_FEW",
    "SmallWeight",
    "difference_of",
    "halves_of",
    "is_near",
    "native_norm",
    "router_weight",
    "takes_many",
    "usable",
    "warn_of_difference",
    "weight_of",
]

_log = logging.getLogger(__name__)

# Rows up to which the extension multiplies matrices that are not quantized, too: a batch gives the bits of its sequences alone.
MOST_FEW = 16
_NEAR = 0.02  # of the norm: int8 activations and bf16 roundings give 0.01, another rope or scaling more than 0.1


def warn_of_difference(name: str, difference: str) -> None:
    """Say that the known code at ``name`` does not give what ours gives: it keeps its own forward."""
    _log.warning("%s keeps its own forward: %s; please report this with the versions of torch and transformers", name, difference)


class SmallWeight(nn.Parameter):
    """A bf16 matrix that multiplies a few rows itself when torch's ``linear`` is called on it."""

    place: Any
    address: int
    rows: int
    cols: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> SmallWeight:
        """Shares ``weight``'s memory."""
        made = cls(weight, requires_grad=False)
        made.rows, made.cols, made.address = weight.shape[0], weight.shape[1], weight.data_ptr()
        made.place = native.Place.make(BF16, made.rows, made.cols, [0], 0, 0, -1, 0)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and not kwargs and (len(args) == 2 or args[2] is None):
            x, own = args[0], vars(args[1])  # a tensor's own properties would come back here
            cols = own.get("cols", 0)
            with torch._C.DisableTorchFunctionSubclass():
                usable = args[1].data_ptr() == own.get("address") and not flows(args[1])
            few = x.dtype == torch.bfloat16 and x.numel() <= MAX_ROWS * cols and x.is_contiguous() and not x.requires_grad
            if few and usable:
                out, count = x.new_empty(*x.shape[:-1], own["rows"]), x.numel() // cols
                native.linear(own["place"], own["address"], BF16, x.data_ptr(), 1, count, out.data_ptr(), 1, True, 1)
                return out
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def usable(x: torch.Tensor) -> bool:
    """Whether ``x`` [..., cols] is something for the extension."""
    refuse_transforms()
    return x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous() and not x.requires_grad and x.numel() > 0


def takes_many(layers: Sequence[Any], exact: bool) -> bool:
    """Whether the extension is to multiply many rows by ``layers``: their large matrices are quantized, activations not exact."""
    return not exact and all(isinstance(layer, QuantizedLinear) or layer.weight.numel() <= SMALL for layer in layers)


def is_near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two ways to compute the same thing may have given these."""
    return bool((got.float() - want.float()).norm() <= _NEAR * want.float().norm()) and bool(want.abs().max() > 0)


def difference_of(got: torch.Tensor, want: torch.Tensor) -> str:
    """For people: how far ``got`` is from ``want``."""
    distance = float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))
    return f"the kernel's result differs from it by {distance:.1%} of its norm"


def native_norm(module: Any, norm: Norm | None) -> Any:
    """The extension's Norm of ``module``, or of none."""
    if norm is None:
        return native.Norm.make(0, 0, 0, 0.0, 0.0, False, False)
    bias = module.bias.data_ptr() if norm.bias else 0
    dtype = DTYPES[module.weight.dtype]
    return native.Norm.make(module.weight.data_ptr(), bias, dtype, norm.eps, norm.offset, norm.rounds_first, norm.centered)


def router_weight(router: Any) -> Any:
    """The extension's Weight of a router, whose numbers are bf16 or fp32; None if it has no kernel."""
    found = weight_of(router)
    weight = getattr(router, "weight", None)
    kinds = {torch.bfloat16: BF16, torch.float32: F32}
    if found is not None or type(weight) is not nn.Parameter or weight.dtype not in kinds or not weight.is_contiguous():
        return found
    bias = getattr(router, "bias", None)
    if bias is not None and bias.dtype not in DTYPES:
        return None
    place = native.Place.make(kinds[weight.dtype], *weight.shape, [0], 0, 0, -1, 0)
    return native.Weight.make(place, weight.data_ptr(), *((bias.data_ptr(), DTYPES[bias.dtype]) if bias is not None else (0, 0)))


def halves_of(layer: Any) -> list[Any]:
    """The extension's Weights of the first and of the second half of a linear layer's rows; None where there is no kernel."""
    whole, rows = weight_of(layer), layer.out_features // 2
    if whole is None or layer.bias is not None:
        return [None, None]
    if not isinstance(layer, QuantizedLinear):
        step = rows * layer.in_features * 2
        places = [native.Place.make(BF16, rows, layer.in_features, [0], 0, 0, -1, 0)] * 2
        return [native.Weight.make(place, layer.weight.data_ptr() + i * step, 0, 0) for i, place in enumerate(places)]
    return [native.Weight.make(layer.place_of(i * rows, rows), layer.address, 0, 0) for i in range(2)]


def weight_of(layer: Any) -> Any:
    """The extension's Weight of a linear layer or a router; None if it has no kernel."""
    bias = getattr(layer, "bias", None)
    if bias is not None and bias.dtype not in DTYPES:
        return None
    at, dtype = (bias.data_ptr(), DTYPES[bias.dtype]) if bias is not None else (0, 0)
    if isinstance(layer, QuantizedLinear):
        return native.Weight.make(layer.place, layer.address, at, dtype) if layer.place is not None else None
    weight = getattr(layer, "weight", None)
    if isinstance(weight, SmallWeight):
        return native.Weight.make(vars(weight)["place"], vars(weight)["address"], at, dtype)
    if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16 and layer.weight.is_contiguous():
        place = native.Place.make(BF16, *layer.weight.shape, [0], 0, 0, -1, 0)
        return native.Weight.make(place, layer.weight.data_ptr(), at, dtype)
    return None
