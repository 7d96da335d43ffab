"""Weights that stay as a store's dense.safetensors has them: matrices in quantized blobs, the embedding on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from fate_moe.core import BlobLayout
from fate_moe.kernels.gradients import flows, frozen, refuse_transforms
from fate_moe.kernels.native import DTYPES, PLANES, WIDTHS, matrix_place, native
from fate_moe.kernels.reference import dequantize
from fate_moe.layers.frozen import FrozenWeight
from fate_moe.quant.blob import views
from fate_moe.quant.choices import GROUP_SIZES
from fate_moe.store.rows import StoredRows

__all__ = ["QuantizedGroups", "QuantizedLinear", "quantized_weight", "stored_weight"]

# With exact activations up to this many rows of x are multiplied as the weights lie; for more, weights are written out tile by tile
# for torch's GEMM.
MAX_ROWS = 8
_TILE_BYTES = 8 << 20
_QUANTIZED = (
    "a quantized weight cannot be changed, trained, copied or merged into: train adapters beside it, or convert with "
    "dense_precision='lossless' (--dense-precision lossless)"
)
_ON_DISK = "the embedding's rows stay in the store, where they cannot be changed, trained or copied; train an adapter beside it"


def _numbers(parts: dict[str, torch.Tensor], layout: BlobLayout, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a blob's parts as numbers [n, cols]."""
    planes = [parts[f"weight.plane{i}"] for i in range(len(layout.plane_widths))]
    scale, zero = parts["weight.scale"], parts["weight.zero"]
    kind = WIDTHS.get(layout.plane_widths) if layout.group_size in GROUP_SIZES and scale.device.type == "cpu" else None
    if native is not None and kind is not None and dtype in (torch.float32, torch.bfloat16):
        at, places = planes[0].data_ptr(), [part.data_ptr() for part in (*planes, scale, zero)]
        offsets = [place - at for place in places]
        out = torch.empty(len(scale), cols, dtype=dtype)
        place = native.Place.make(kind, len(scale), cols, offsets[:-2], *offsets[-2:], -1, 0, layout.group_size)
        native.expand(place, at, PLANES, out.data_ptr(), DTYPES[dtype], torch.get_num_threads())
        return out
    return dequantize(planes, scale, zero, cols=cols, group_size=layout.group_size, widths=layout.plane_widths).to(dtype)


def quantized_weight(blob: torch.Tensor, layout: BlobLayout, shape: tuple[int, int], dtype: torch.dtype) -> FrozenWeight:
    """The weight [out, in] or [num, dim] in ``blob`` uint8 for modules that multiply by it, look rows up in it, or both (tied).

    Nothing is copied; its numbers and rows are those of ``dequantize`` (kernels/reference.py), rounded to ``dtype``.
    """
    parts = views(layout, blob)

    def rows(ids: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(ids, dtype=torch.int64) if len(ids) != 1 else slice(ids[0], ids[0] + 1)  # a view costs less
        return _numbers({name: part[index] for name, part in parts.items()}, layout, shape[1], dtype)

    return FrozenWeight(shape, dtype, "cpu", partial(_numbers, parts, layout, shape[1], dtype), _QUANTIZED, rows)


def stored_weight(stored: StoredRows, shape: tuple[int, int], dtype: torch.dtype) -> FrozenWeight:
    """The embedding's weight [num, dim] whose rows are read from the store, quantized or not, when they are asked for.

    A token costs three reads, the first time of the disk, then of the page cache. Qwen1.5-MoE's embedding would take 306 MiB of the
    budget as int8, room for 65 of its experts.
    """

    def rows(ids: Sequence[int]) -> torch.Tensor:
        parts, layout = stored.read(ids), stored.layout
        return parts["weight"].to(dtype) if layout is None else _numbers(parts, layout, shape[1], dtype)

    return FrozenWeight(shape, dtype, "cpu", lambda: rows(range(shape[0])), _ON_DISK, rows)


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` on a quantized weight, with int8 activations by group (``exact``: fp32, and many rows through torch's GEMM).

    ``blob`` uint8 holds ``weight`` [out, in], made by ``quantized_weight``, in ``layout``; nothing is copied. Gradients with
    respect to x are those of the weight's numbers (kernels/gradients.py). Another parameter in place of ``weight`` is honoured, at
    torch's speed.
    """

    _own: FrozenWeight

    def __init__(self, blob: torch.Tensor, layout: BlobLayout, weight: FrozenWeight, like: nn.Linear, exact: bool) -> None:
        nn.Module.__init__(self)
        self.training = like.training
        self._blob = blob
        self._layout = layout
        self._parts = views(layout, blob)
        shape = self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        self.weight = weight
        vars(self)["_own"] = weight  # as a second parameter it would be a second name in ``state_dict``
        self.bias = like.bias
        self._exact = exact
        place = matrix_place(layout, "weight", shape) if native is not None else "no extension"
        self.place = None if isinstance(place, str) else place  # the extension's, counted from ``address``
        self.address = blob.data_ptr()
        self._tiles = self._cut(max(1, _TILE_BYTES // (2 * self.in_features))) if self.place is not None else []

    def place_of(self, first: int, count: int) -> Any:
        """The extension's Place of ``count`` rows, counted from ``address``; only where ``place`` is one."""
        offsets = {part.name: part.offset + first * self._parts[part.name][0].nbytes for part in self._layout.parts}
        planes = [offsets[f"weight.plane{i}"] for i in range(len(self._layout.plane_widths))]
        kind = PLANES if len(planes) == PLANES else 8
        where = planes, offsets["weight.scale"], offsets["weight.zero"]
        return native.Place.make(kind, count, self.in_features, *where, -1, 0, self._layout.group_size)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What inputs have to be rounded for."""
        return self._layout.plane_widths, self._layout.group_size

    @property
    def is_own(self) -> bool:
        """Whether ``weight`` is still that of the blob."""
        return self._parameters.get("weight") is self._own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out] of ``x`` [..., in], in x's dtype."""
        if not self.is_own:
            return linear(x, self.weight, self.bias)
        refuse_transforms()
        rows = x.reshape(-1, self.in_features)
        if flows(x):
            out = frozen(lambda rows: (self._product(rows), x.dtype), self._gradients, rows, keep=False)
        else:
            out = self._product(rows)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, out] of ``rows`` [n, in], without the bias."""
        dtype = rows.dtype
        if self.place is None or dtype not in (torch.float32, torch.bfloat16):
            return linear(rows, self._own.numbers().to(dtype))
        rows, threads = rows.contiguous(), torch.get_num_threads()
        out = torch.empty(len(rows), self.out_features, dtype=dtype)
        to = out.data_ptr(), DTYPES[dtype]
        if not self._exact or len(rows) <= MAX_ROWS:
            native.linear(self.place, self.address, PLANES, rows.data_ptr(), DTYPES[dtype], len(rows), *to, self._exact, threads)
        else:
            first = 0
            for place, count in self._tiles:
                out[:, first : first + count] = linear(rows, self._tile(place, count, dtype))
                first += count
        return out

    def _gradients(self, gradient: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor]:
        """[n, in] with respect to rows of ``dtype``, from the product's [n, out]: tile by tile, summed in fp32."""
        if not self._tiles or dtype not in (torch.float32, torch.bfloat16):
            return (gradient.to(dtype) @ self._own.numbers().to(dtype),)
        summed, first = torch.zeros(len(gradient), self.in_features, dtype=torch.float32), 0
        for place, count in self._tiles:
            summed += gradient[:, first : first + count].to(dtype) @ self._tile(place, count, dtype)
            first += count
        return (summed.to(dtype),)

    def _tile(self, place: Any, count: int, dtype: torch.dtype) -> torch.Tensor:
        tile = torch.empty(count, self.in_features, dtype=dtype)
        native.expand(place, self.address, PLANES, tile.data_ptr(), DTYPES[dtype], torch.get_num_threads())
        return tile

    def _cut(self, step: int) -> list[tuple[Any, int]]:
        """The matrix in runs of ``step`` rows, each with its Place and its number of rows."""
        tiles = []
        for first in range(0, self.out_features, step):
            count = min(step, self.out_features - first)
            tiles.append((self.place_of(first, count), count))
        return tiles


class QuantizedGroups(QuantizedLinear):
    """A Linear layer whose rows are in groups: [..., groups, out / groups] of x [..., groups, in] (DeepSeek-V4's ``o_a_proj``).

    The family's own forward multiplies the weight's numbers where gradients flow or there is no kernel.
    """

    def __init__(self, blob: torch.Tensor, layout: BlobLayout, weight: FrozenWeight, like: Any, exact: bool) -> None:
        super().__init__(blob, layout, weight, like, exact)
        self.n_groups = int(like.n_groups)  # the family's forward reads it
        self._family = type(like).forward
        self._groups = self._cut(self.out_features // self.n_groups) if self.place is not None else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., groups, out / groups] of ``x`` [..., groups, in], in x's dtype."""
        refuse_transforms()
        many = self._exact and x.numel() > MAX_ROWS * self.n_groups * self.in_features
        if not self.is_own or not self._groups or many or flows(x) or x.dtype not in (torch.float32, torch.bfloat16):
            return self._family(self, x)  # type: ignore[no-any-return]
        rows, threads = x.reshape(-1, self.n_groups, self.in_features).transpose(0, 1).contiguous(), torch.get_num_threads()
        out = torch.empty(self.n_groups, rows.shape[1], self.out_features // self.n_groups, dtype=x.dtype)
        kind = DTYPES[x.dtype]
        for (place, _), of, to in zip(self._groups, rows, out, strict=True):
            native.linear(place, self.address, PLANES, of.data_ptr(), kind, len(of), to.data_ptr(), kind, self._exact, threads)
        return out.transpose(0, 1).reshape(*x.shape[:-1], -1)
