"""Triton's interpreter in a third of its time: what it works out anew for every operation is kept. And two instructions round as
a GPU's: fma once (the interpreter's own twice), fp32 to bf16 to nearest even (its own towards zero).

Names of Triton's that are not public are changed here, so this is for the releases it was written for; with any other the
interpreter stays as it is.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton._utils import validate_block_shape
from triton.runtime import interpreter

__all__ = ["quicken"]

_RELEASE = "3.7."


def quicken() -> None:
    """Change the interpreter of this process; a second call changes nothing."""
    interpreter.InterpreterBuilder.create_fma = _fma
    interpreter.InterpreterBuilder.create_fp_trunc = _shorten
    if not triton.__version__.startswith(_RELEASE) or interpreter._patch_lang is _patched_already:
        return
    # Every call of a device function made the builtins interpreted ones again; nothing here wants the others back.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = _patched_already
    # An int64 copy of every sum, for an assertion that is left out unless ``debug`` is on.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _Kept(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _init_block_type
    tl.core.tensor.__init__ = _init_tensor
    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = _unless_one_shape(semantic.broadcast_impl_value)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """``kernels/reference.fused`` of handles; of other dtypes than fp32 what the interpreter has."""
    data = x.data * y.data + z.data if z.data.dtype != np.float32 else _fused(x.data, y.data, z.data)
    return interpreter.TensorHandle(data, z.dtype.scalar)


def _shorten(self: Any, src: Any, dst_type: Any) -> Any:
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return self.cast_impl(src, dst_type)
    bits = src.data.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return interpreter.TensorHandle(np.where(np.isnan(src.data), bits >> 16 | 64, rounded).astype(np.uint16), tl.bfloat16)


@np.errstate(all="ignore")
def _fused(x: Any, y: Any, z: Any) -> Any:
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    inexact = (error != 0) & np.isfinite(error) & ((total.view(np.int64) & 1) == 0)
    toward = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(inexact, toward, total).astype(np.float32)


def _patched_already(fn: Any) -> Any:
    return interpreter._LangPatchScope()


class _Kept:
    """A function of a type, asked once for each name."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._found: dict[str, Any] = {}

    def __call__(self, of: Any) -> Any:
        if (found := self._found.get(of.name)) is None:
            found = self._found[of.name] = self._function(of)
        return found


class _Shape:
    """What types and tensors of one shape share."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.of_type = tl.core.tuple(list(sizes))
        self.of_tensor = tl.core.tuple([tl.constexpr(size) for size in sizes])
        self.numel = validate_block_shape(sizes)
        self.tensor_numel = tl.constexpr(self.numel)
        self.name = str(self.of_type)


_SHAPES: dict[tuple[int, ...], _Shape] = {}
_SCALAR = _Shape(())


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    if (kept := _SHAPES.get(sizes)) is None:
        kept = _SHAPES[sizes] = _Shape(sizes)
    self.element_ty, self.shape, self.numel, self.kept = element_ty, kept.of_type, kept.numel, kept
    self.name = f"<{kept.name}, {element_ty}>"


def _init_tensor(self: Any, handle: Any, of: Any) -> None:
    kept = of.kept if of.is_block() else _SCALAR
    self.handle, self.type, self.dtype = handle, of, of.scalar
    self.shape, self.numel = kept.of_tensor, kept.tensor_numel


def _unless_one_shape(broadcast: Any) -> Any:
    return lambda self, lhs, rhs: (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)
