"""Which rows of a call [batch, tokens] are tokens, and where in their sequences and in the KV cache they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fate_moe.kernels.attention import row_width
from fate_moe.kernels.native import native
from fate_moe.kernels.plain_layer import Attention

__all__ = ["BLOCK", "BatchRows", "Masks", "batch_rows", "contiguous_kv", "forgotten_kv", "padding_of", "state_kv"]

BLOCK = 64  # positions of a block of the KV cache (csrc/steps.h)


@dataclass(frozen=True)
class BatchRows:
    """``count`` places of each of ``batch`` sequences behind ``past`` that are cached; sequence i's first ``padding[i]`` places are
    none of its tokens."""

    batch: int
    count: int
    past: int
    padding: tuple[int, ...]

    @cached_property
    def is_padded(self) -> bool:
        """Whether this call has places that are no tokens."""
        return any(first > self.past for first in self.padding)

    @cached_property
    def counts(self) -> list[int]:
        """Tokens in this call, by sequence."""
        return [max(0, self.count - max(0, first - self.past)) for first in self.padding]

    @cached_property
    def num_rows(self) -> int:
        return sum(self.counts) if self.is_padded else self.batch * self.count

    @cached_property
    def spans(self) -> Any:
        """As the extension wants them."""
        pasts = [max(0, self.past - first) for first in self.padding]
        return native.Spans.make(self.counts, pasts, list(range(self.batch)), list(self.padding))

    def pieces(self, most: int) -> Iterator[tuple[int, int, Any]]:
        """The rows in runs of up to ``most``: where each begins and ends, and its spans."""
        for begin in range(0, self.num_rows, most):
            counts, pasts, first = list[int](), list[int](), 0
            for count, padding in zip(self.counts, self.padding, strict=True):
                low, high = max(begin, first), min(begin + most, first + count)
                counts.append(max(0, high - low))
                pasts.append(max(0, self.past - padding) + max(0, low - first))
                first += count
            spans = native.Spans.make(counts, pasts, list(range(self.batch)), list(self.padding))
            yield begin, min(begin + most, self.num_rows), spans

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [num_rows]: the tokens among the batch * count places."""
        places = torch.arange(self.batch * self.count).view(self.batch, self.count)
        return torch.cat([row[self.count - count :] for row, count in zip(places, self.counts, strict=True)])

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, n] of ``x`` [batch or 1, count, n], contiguous."""
        if len(x) != self.batch:
            x = x.expand(self.batch, -1, -1)
        flat = x.reshape(self.batch * self.count, x.shape[-1])
        return flat[self.index] if self.is_padded else flat.contiguous()

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch, count, n] of ``rows`` [num_rows, n]; zeros where there is no token."""
        if not self.is_padded:
            return rows.view(self.batch, self.count, -1)
        out = rows.new_zeros(self.batch * self.count, rows.shape[-1])
        out[self.index] = rows
        return out.view(self.batch, self.count, -1)

    def last_rows(self, most: int) -> list[int]:
        """Of each sequence its last ``most`` tokens, as rows."""
        found, end = list[int](), 0
        for count in self.counts:
            end += count
            found += range(end - min(most, count), end)
        return found

    def put_last(self, rows: torch.Tensor, most: int) -> torch.Tensor:
        """[batch, min(most, count), n] of ``rows``, those of ``last_rows``; zeros where there is no token."""
        most = min(most, self.count)
        if min(self.counts) >= most:
            return rows.view(self.batch, most, -1)
        out, begin = rows.new_zeros(self.batch, most, rows.shape[-1]), 0
        for of, count in zip(out, self.counts, strict=True):
            kept = min(most, count)
            of[most - kept :] = rows[begin : begin + kept]
            begin += kept
        return out


def batch_rows(batch: int, count: int, past: int, padding: Sequence[int]) -> BatchRows | None:
    """None where there is no token in this call."""
    return BatchRows(batch, count, past, tuple(padding)) if any(first < past + count for first in padding) else None


def padding_of(mask: torch.Tensor | None, batch: int, count: int, past: int, window: int | None = None) -> tuple[int, ...] | None:
    """The padding of each sequence before its first token, if ``mask`` is causal with nothing but that; else None.

    ``mask``: None; [batch, past + count] that is not 0 at tokens; or bool [batch or 1, 1, count, past + count], True where a place
    may be seen; or numbers, 0 there and else the least number (eager attention). What a place of the padding sees is not looked at.
    With a ``window`` a place sees only so many places, and [batch or 1, 1, count, n] may be of the last n places only; then only
    masks of sequences without padding are known.
    """
    total = past + count
    if mask is None:
        return (0,) * batch if window is None or total <= window else None
    if mask.dim() == 4 and mask.is_floating_point():
        allowed = mask == 0
        if not torch.equal(mask, torch.zeros_like(mask).masked_fill(~allowed, torch.finfo(mask.dtype).min)):
            return None
        mask = allowed
    if mask.dim() == 4 and window is not None:
        cut = total - mask.shape[-1]
        if mask.shape[:3] not in ((batch, 1, count), (1, 1, count)) or not 0 <= cut <= max(0, past + 1 - window):
            return None
        wanted = torch.ones(count, total, dtype=torch.bool).tril(past).triu(past + 1 - window)[:, cut:]
        return (0,) * batch if mask.dtype == torch.bool and bool((mask[:, 0] == wanted).all()) else None
    if mask.dim() == 2:
        if mask.shape != (batch, total):
            return None
        seen = mask != 0
        if bool(seen.all()):
            return (0,) * batch
        if not bool((seen[:, 1:] >= seen[:, :-1]).all()):
            return None
    else:
        if mask.dtype != torch.bool or mask.shape not in ((batch, 1, count, total), (1, 1, count, total)):
            return None
        seen = mask[:, 0, -1]
    padding = total - seen.sum(-1)
    if mask.dim() == 4:
        column, row = torch.arange(total), torch.arange(past, total)[:, None]
        first = padding[:, None, None]
        if not bool(((mask[:, 0] == ((column >= first) & (column <= row))) | (row < first)).all()):
            return None
    found = tuple(padding.tolist())
    return found * (batch // len(found))


class Masks:
    """``padding_of`` for the layers of a pass, which are given the same mask for each window: it is looked at once."""

    def __init__(self) -> None:
        self._last: dict[int | None, tuple[torch.Tensor, int, tuple[int, ...] | None]] = {}

    def padding(
        self, mask: torch.Tensor | None, batch: int, count: int, past: int, window: int | None = None
    ) -> tuple[int, ...] | None:
        """See ``padding_of``."""
        if mask is None:
            return padding_of(mask, batch, count, past, window)
        last = self._last.get(window)
        if last is None or last[0] is not mask or last[1] != past:
            last = self._last[window] = mask, past, padding_of(mask, batch, count, past, window)
        return last[2]

    def forget(self) -> None:
        """The pass is over."""
        self._last.clear()


def state_kv(inputs: torch.Tensor, states: torch.Tensor) -> tuple[int, ...]:
    """The extension's Kv of what a gated delta rule keeps (csrc/layers.h), contiguous: bf16 [batch, channels, kernel] and fp32
    [batch, value_heads, key_dim, value_dim]."""
    assert inputs.is_contiguous()
    assert states.is_contiguous()
    return inputs.data_ptr(), states.data_ptr(), inputs[0].numel(), states[0].numel(), 0, 0


def forgotten_kv(attention: Attention, batch: int, count: int, kv_format: str) -> torch.Tensor:
    """Keys and values of ``batch`` sequences of ``count`` tokens that no cache keeps; zeros, for places that are no tokens."""
    row = row_width(kv_format, attention.head_dim)
    dtype = torch.bfloat16 if kv_format == "bf16" else torch.uint8
    return torch.zeros(2, batch, attention.kv_heads, count, row, dtype=dtype)


def contiguous_kv(keys: torch.Tensor, values: torch.Tensor) -> tuple[int, ...]:
    """The extension's Kv of ``keys`` and ``values`` [batch, kv_heads, room, row], as RoomyLayer has them in bf16 and Int8Layer in
    uint8: addresses, strides in numbers, and the format."""
    of_entry, of_head, of_position, _ = keys.stride()
    return keys.data_ptr(), values.data_ptr(), of_entry, BLOCK * of_position, of_head, int(keys.dtype == torch.uint8)
