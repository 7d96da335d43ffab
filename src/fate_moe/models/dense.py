"""Modules whose weights stay quantized: they stand where a store's dense.safetensors has a blob instead of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from fate_moe.core import BlobLayout
from fate_moe.kernels.native import DTYPES, PLANES, matrix_place, native
from fate_moe.kernels.reference import dequantize
from fate_moe.quant.blob import views

__all__ = ["QuantizedEmbedding", "QuantizedLinear"]

# Up to this many rows of x are multiplied as the weights lie; for more, weights are written out tile by tile for torch's GEMM.
MOST_ROWS = 8
_TILE_BYTES = 8 << 20


class _Quantized(nn.Module):
    """``blob`` uint8 holds ``weight`` [out, in] in ``layout``; nothing is copied."""

    def __init__(self, blob: torch.Tensor, layout: BlobLayout, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self._blob = blob
        self._layout = layout
        self._shape = shape
        self._dtype = dtype
        self._parts = views(layout, blob)

    @property
    def weight(self) -> torch.Tensor:
        """The numbers, made anew; for code that looks at them."""
        return self._rows(slice(None), self._dtype)

    def _rows(self, index: Any, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``index`` (a slice or int64 [n]) as numbers [n, in]."""
        parts = {name: part[index] for name, part in self._parts.items()}
        planes = [parts[f"weight.plane{i}"] for i in range(len(self._layout.plane_widths))]
        numbers = dequantize(
            planes,
            parts["weight.scale"],
            parts["weight.zero"],
            cols=self._shape[1],
            group_size=self._layout.group_size,
            widths=self._layout.plane_widths,
        )
        return numbers.to(dtype)


class QuantizedLinear(_Quantized):
    """``nn.Linear`` on a quantized weight: few rows with int8 activations by group (``exact``: fp32), many through torch's GEMM."""

    def __init__(
        self, blob: torch.Tensor, layout: BlobLayout, shape: tuple[int, int], like: nn.Linear, dtype: torch.dtype, exact: bool
    ) -> None:
        super().__init__(blob, layout, shape, dtype)
        self.out_features, self.in_features = shape
        self.bias = like.bias
        self._exact = exact
        place = matrix_place(layout, "weight", shape) if native is not None else "no extension"
        self._place = None if isinstance(place, str) else place
        self._address = blob.data_ptr()
        self._tiles = self._cut() if self._place is not None else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out] of ``x`` [..., in], in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        if self._place is None or x.dtype not in (torch.float32, torch.bfloat16):
            return linear(x, self._rows(slice(None), x.dtype), self.bias)
        if len(rows) <= MOST_ROWS:
            rows = rows.contiguous()
            out = torch.empty(len(rows), self.out_features, dtype=x.dtype)
            dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
            native.linear(
                self._place, self._address, PLANES, rows.data_ptr(), dtype, len(rows), out.data_ptr(), dtype, self._exact, threads
            )
        else:
            out = torch.cat([linear(rows, self._tile(place, count, x.dtype)) for place, count in self._tiles], dim=1)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _tile(self, place: Any, count: int, dtype: torch.dtype) -> torch.Tensor:
        tile = torch.empty(count, self.in_features, dtype=dtype)
        native.expand(place, self._address, PLANES, tile.data_ptr(), DTYPES[dtype], torch.get_num_threads())
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
            scale, zero = offsets["weight.scale"], offsets["weight.zero"]
            tiles.append((native.Place.make(kind, count, self.in_features, planes, scale, zero, -1, 0), count))
        return tiles


class QuantizedEmbedding(_Quantized):
    """``nn.Embedding`` on a quantized weight: only the rows that are asked for become numbers."""

    def __init__(self, blob: torch.Tensor, layout: BlobLayout, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(blob, layout, shape, dtype)
        self.num_embeddings, self.embedding_dim = shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., embedding_dim] in the model's dtype."""
        return self._rows(ids.reshape(-1), self._dtype).view(*ids.shape, self.embedding_dim)
