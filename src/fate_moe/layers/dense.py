"""Modules whose weights stay as a store's dense.safetensors has them: Linear on a quantized blob, the embedding on the disk."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from fate_moe.core import BlobLayout
from fate_moe.kernels.gradients import flows, frozen, refuse_transforms
from fate_moe.kernels.native import DTYPES, PLANES, WIDTHS, matrix_place, native
from fate_moe.kernels.reference import dequantize
from fate_moe.layers.frozen import FrozenWeight
from fate_moe.quant.blob import views
from fate_moe.quant.choices import GROUP_SIZES
from fate_moe.store.rows import StoredRows

__all__ = ["QuantizedLinear", "StoredEmbedding"]

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


def _set_weight(module: nn.Module, weight: FrozenWeight) -> None:
    """``module.weight``, and as a plain attribute ``_own``: a second parameter would be a second name in ``state_dict``."""
    module.weight = weight
    vars(module)["_own"] = weight


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` on a quantized weight, with int8 activations by group (``exact``: fp32, and many rows through torch's GEMM).

    ``blob`` uint8 holds ``weight`` [out, in] in ``layout``; nothing is copied. Gradients with respect to x are those of the
    weight's numbers (kernels/gradients.py). Another parameter in place of ``weight`` is honoured, at torch's speed.
    """

    _own: FrozenWeight

    def __init__(
        self, blob: torch.Tensor, layout: BlobLayout, shape: tuple[int, int], like: nn.Linear, dtype: torch.dtype, exact: bool
    ) -> None:
        nn.Module.__init__(self)
        self.training = like.training
        self._blob = blob
        self._layout = layout
        self._parts = views(layout, blob)
        self.out_features, self.in_features = shape
        numbers = partial(_numbers, self._parts, layout, shape[1], dtype)
        _set_weight(self, FrozenWeight(shape, dtype, "cpu", numbers, _QUANTIZED))
        self.bias = like.bias
        self._exact = exact
        place = matrix_place(layout, "weight", shape) if native is not None else "no extension"
        self.place = None if isinstance(place, str) else place  # the extension's, counted from ``address``
        self.address = blob.data_ptr()
        self._tiles = self._cut() if self.place is not None else []

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

    def _cut(self) -> list[tuple[Any, int]]:
        """The matrix in runs of rows, each with its Place and its number of rows."""
        step = max(1, _TILE_BYTES // (2 * self.in_features))
        tiles = []
        for first in range(0, self.out_features, step):
            count = min(step, self.out_features - first)
            offsets = {part.name: part.offset + first * self._parts[part.name][0].nbytes for part in self._layout.parts}
            planes = [offsets[f"weight.plane{i}"] for i in range(len(self._layout.plane_widths))]
            kind = PLANES if len(planes) == PLANES else 8
            where = planes, offsets["weight.scale"], offsets["weight.zero"]
            place = native.Place.make(kind, count, self.in_features, *where, -1, 0, self._layout.group_size)
            tiles.append((place, count))
        return tiles


class StoredEmbedding(nn.Embedding):
    """``nn.Embedding`` [num, dim] whose rows are read from the store, quantized or not, and become numbers when they are asked for.

    A token costs three reads, the first time of the disk, then of the page cache. Qwen1.5-MoE's embedding would take 306 MiB of the
    budget as int8, room for 65 of its experts. Another parameter in place of ``weight`` is honoured.
    """

    _own: FrozenWeight

    def __init__(self, rows: StoredRows, shape: tuple[int, int], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.training = False
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, None, 2.0, False, False
        self._rows = rows
        everything = list(range(self.num_embeddings))
        _set_weight(self, FrozenWeight(shape, dtype, "cpu", lambda: self._of(everything), _ON_DISK))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., dim] in the model's dtype. Raises IndexError for an id outside the vocabulary."""
        if self._parameters.get("weight") is not self._own:
            return embedding(ids, self.weight)
        refuse_transforms()
        if ids.numel() == 1 and 0 <= (token := int(ids)) < self.num_embeddings:
            return self._of([token]).view(*ids.shape, self.embedding_dim)
        different, place = torch.unique(ids, return_inverse=True)
        if different.numel() and not 0 <= int(different[0]) <= int(different[-1]) < self.num_embeddings:
            raise IndexError(f"token ids must be in 0..{self.num_embeddings - 1}, not {int(different[0])}..{int(different[-1])}")
        return self._of(different.tolist())[place.reshape(-1)].view(*ids.shape, self.embedding_dim)

    def _of(self, ids: list[int]) -> torch.Tensor:
        parts, layout = self._rows.read(ids), self._rows.layout
        dtype = self._own.dtype
        return parts["weight"].to(dtype) if layout is None else _numbers(parts, layout, self.embedding_dim, dtype)
