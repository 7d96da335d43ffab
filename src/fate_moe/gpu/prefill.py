"""Many tokens at once: resident experts first, the others streamed through staging slots, most popular first.

Two halves of the staging slots take turns: one is copied to by the DMA engine while the grouped kernels read the other. Nearly
every expert of a layer is used, so the first half of the next layer's missing ones is copied before its router has run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fate_moe.core import Need
from fate_moe.gpu.host import View
from fate_moe.gpu.layout import DeviceLayout
from fate_moe.gpu.state import DeviceState, padded
from fate_moe.gpu.streams import Lane
from fate_moe.kernels.triton_grouped import grouped_kernel, order_kernel, tiles_kernel
from fate_moe.kernels.triton_prompt import combine_kernel, down_prompt_kernel, gate_up_prompt_kernel
from fate_moe.kernels.triton_quantize import quantize_rows_kernel

__all__ = ["Prefill", "dot_dtype"]

# With fewer choices than this per expert of a layer, too many experts are not chosen at all to copy any before the router has run.
_AHEAD_CHOICES = 4
_COMBINED, _QUANTIZED, _ORDERED = 1024, 16, 4096  # columns, groups and choices that a program has at once


class _Rows(NamedTuple):
    """Inputs of a product: numbers [rows, cols], or (``quantize_rows_kernel``) codes int8 [rows, padded cols] with scales and sums
    fp32 [rows, groups]."""

    values: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor


class _Pass(NamedTuple):
    """One layer's tokens: ``order`` [choices] the choices by expert, ``starts`` [experts + 1] where each expert's begin in it, the
    tokens' ``hidden`` states, and by choice ``inner`` and ``outputs`` fp32 [choices, hidden] to write to."""

    layer: int
    starts: torch.Tensor
    order: torch.Tensor
    hidden: _Rows
    inner: _Rows
    outputs: torch.Tensor


class Prefill:
    """Prefill through the pool of ``state``, whose residency does not move. The host waits for the device once in a layer that is
    not whole."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state
        device = state.device
        self._main, self._copies = Lane(device, False), Lane(device, True)
        self._half = state.pool.num_staging // 2
        self._turn = self._reading = 0  # the half that is copied to next, and the one that is read next
        self._free: list[Any] = [None, None]  # by half: the mark after which nothing reads it
        self._arrived: list[Any] = []  # marks of copies not yet released, oldest first
        self._early: list[tuple[int, int]] = []  # (expert, slot) copied before the router of ``_early_layer`` has run
        self._early_layer = -1
        names = state.tables.num_experts + 1
        self._mail = torch.empty(3 * names, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._sent = self._mail
        self._sent_mark: Any = None

    def compute(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        """As ``DeviceExperts.compute``."""
        state, num_experts = self._state, self._state.tables.num_experts
        tokens, top_k = index.shape
        hidden = hidden.contiguous()
        index = index.contiguous()
        order = torch.empty(index.numel(), dtype=torch.int64, device=hidden.device)
        starts = torch.empty(num_experts + 1, dtype=torch.int64, device=hidden.device)
        order_kernel[(num_experts + 1,)](index, order, starts, index.numel(), num_experts=num_experts, BLOCK=_ORDERED, num_warps=8)
        layout = state.layouts[layer]
        inner = _empty_rows(layout, tokens * top_k, layout.width, hidden)
        outputs = torch.empty(tokens * top_k, layout.cols, device=hidden.device)
        rows = _Pass(layer, starts, order, _rows(layout, hidden), inner, outputs)
        if all(quota == num_experts for quota in state.tables.quotas[layer : layer + 2]):  # nothing comes, nothing comes early
            self._run_residents(rows)
        else:
            self._send(layer, starts)
            if state.options.overlap:  # enqueued before the host knows what is missing
                self._run_residents(rows)
            self._run_missing(rows)
        out = torch.empty_like(hidden)
        combine_kernel[(tokens, triton.cdiv(layout.cols, _COMBINED))](
            outputs, index, routing_weights.contiguous(), out, num_experts=num_experts, cols=layout.cols, top_k=top_k,
            BLOCK=_COMBINED, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return out

    def lend(self) -> None:
        """What is enqueued so far may read all staging slots: they are written again after it."""
        self._free = [self._main.mark()] * 2

    def _run_missing(self, rows: _Pass) -> None:
        """Stream and compute what has no slot (without overlap residents too), and begin with the next layer's."""
        layer, state, num_experts = rows.layer, self._state, self._state.tables.num_experts
        first, slots, next_slots = self._receive()
        counts = [end - start for start, end in itertools.pairwise(first)]
        chosen = sorted((expert for expert in range(num_experts) if counts[expert]), key=lambda expert: -counts[expert])
        layout = state.layouts[layer]
        early = self._early if self._early_layer == layer else []
        arriving = {expert for expert, _ in early}
        missing = [expert for expert in chosen if slots[expert] < 0 and expert not in arriving]
        short = self._short_views(layer, missing, {expert: counts[expert] for expert in chosen})

        def run(placed: Sequence[tuple[int, int]]) -> None:
            for planes in {short.get(expert, layout.planes) for expert, _ in placed}:
                same = [(expert, slot) for expert, slot in placed if short.get(expert, layout.planes) == planes]
                tiles = [(slot, first[expert], counts[expert]) for expert, slot in same]
                self._run(rows, planes, tiles)

        waves = [missing[start : start + self._half] for start in range(0, len(missing), self._half)]
        copied = self._copy(layer, waves[0], short) if waves else []  # under way while the residents compute
        if not state.options.overlap:
            self._main.wait(self._arrived[-1] if copied else None)
            self._run_residents(rows)
        if early:
            self._await()
            run([(expert, slot) for expert, slot in early if counts[expert]])
            self._release()
        for wave in [*waves[1:], None][: len(waves)]:
            self._await()
            run(copied)
            self._release()
            copied = self._copy(layer, wave, short) if wave else []
        # Load on demand copies nothing before the router has run. With large experts decode's limit may be 0: prefill still does.
        looks = state.options.limit > 0 or state.options.overlap
        many = looks and rows.order.numel() >= _AHEAD_CHOICES * num_experts
        ahead = [expert for expert, slot in enumerate(next_slots) if slot < 0][: self._half] if many else []
        self._early, self._early_layer = self._copy(layer + 1, ahead, {}), layer + 1

    def _send(self, layer: int, starts: torch.Tensor) -> None:
        """Begin to send ``starts`` and this layer's and the next one's slots to the host, for ``_receive``."""
        both = torch.cat([starts, self._state.tables.slot_of[layer : layer + 2].reshape(-1)])
        self._sent = self._mail[: both.numel()].copy_(both, non_blocking=True)
        self._sent_mark = self._main.mark()

    def _receive(self) -> tuple[list[int], list[int], list[int]]:
        """What ``_send`` sent, once it is here: what has been enqueued since is not waited for."""
        if self._sent_mark is not None:
            self._sent_mark.synchronize()
        values, names = self._sent.tolist(), self._state.tables.num_experts + 1
        return values[:names], values[names : 2 * names - 1], values[2 * names - 1 :]

    def _short_views(self, layer: int, missing: Sequence[int], counts: dict[int, int]) -> dict[int, int]:
        """Of which experts in ``missing`` the precision policy wants only the first planes, and how many. ``counts`` are the tokens
        of all chosen experts; those that are not missing are held whole."""
        policy, views = self._state.precision, self._state.layouts[layer].views
        if policy is None or len(views) < 2 or not missing:
            return {}
        absent = set(missing)
        needs = [Need(count, float(count), 0 if expert in absent else views[-1]) for expert, count in counts.items()]
        bits = dict(zip(counts, policy.bits(needs, views, 0.0), strict=True))
        return {expert: views.index(bits[expert]) + 1 for expert in missing if bits[expert] < views[-1]}

    def _copy(self, layer: int, wanted: Sequence[int], short: dict[int, int]) -> list[tuple[int, int]]:
        """Start copying ``wanted`` (at most half of the staging slots; of those in ``short`` so many planes) and say where each
        will be: (expert, slot)."""
        state = self._state
        if not wanted:
            return []
        start = state.pool.num_slots + self._turn * self._half
        self._copies.wait(self._free[self._turn])
        self._turn ^= 1
        placed = [(expert, start + i) for i, expert in enumerate(wanted)]
        first, view_bytes = layer * state.tables.num_experts, state.layouts[layer].view_bytes
        views = {first + expert: View(planes + 1, view_bytes[planes - 1]) for expert, planes in short.items()}
        state.host.copy([(first + expert, slot) for expert, slot in placed], state.pool, self._copies, views)
        self._arrived.append(self._copies.mark())
        return placed

    def _await(self) -> None:
        """What is enqueued from now on finds the oldest copies that nobody awaited yet."""
        self._main.wait(self._arrived[0])

    def _release(self) -> None:
        """The oldest copies have been read by all that is enqueued so far: their half may be written again."""
        del self._arrived[0]
        self._free[self._reading] = self._main.mark()
        self._reading ^= 1

    def _run(self, rows: _Pass, planes: int, placed: Sequence[tuple[int, int, int]]) -> None:
        """Compute experts given as (slot, first place in ``rows.order``, number of rows), from their first ``planes``."""
        block = self._block(rows)
        tiles = [
            (slot, first + start, min(block, count - start)) for slot, first, count in placed for start in range(0, count, block)
        ]
        if tiles:
            table = torch.tensor(tiles, dtype=torch.int32).to(rows.outputs.device, non_blocking=True)
            self._multiply(rows, planes, table)

    def _run_residents(self, rows: _Pass) -> None:
        """Compute the experts that have a slot; which these are, the device looks up itself."""
        tables, block = self._state.tables, self._block(rows)
        most = rows.order.numel() // block + tables.quotas[rows.layer]
        table = torch.zeros(most, 3, dtype=torch.int32, device=rows.outputs.device)
        tiles_kernel[(1,)](
            rows.starts, tables.slot_of[rows.layer], table, num_experts=tables.num_experts, BM=block,
            E=triton.next_power_of_2(tables.num_experts), num_warps=4,
        )  # fmt: skip
        self._multiply(rows, self._state.layouts[rows.layer].planes, table)

    def _block(self, rows: _Pass) -> int:
        """Rows of a tile. It depends on the number of choices alone: unquantized experts' bits depend on it."""
        mean = rows.order.numel() / self._state.tables.num_experts
        if self._state.layouts[rows.layer].planes:
            return 16 if mean <= 12 else 32
        return 16 if mean <= 16 else 64

    def _multiply(self, rows: _Pass, planes: int, table: torch.Tensor) -> None:
        """Both products of the tiles in ``table``, from the first ``planes`` of the weights."""
        state, layout, block = self._state, self._state.layouts[rows.layer], self._block(rows)
        pool = state.pool
        if planes:
            wide, groups, warps, stages = prompt_tile(planes)
            gate_up_prompt_kernel[(table.shape[0], triton.cdiv(layout.width, 64))](
                pool.bytes, table, rows.order, *rows.hidden, *rows.inner, pool.slot_bytes,
                *layout.gate_up, top_k=state.top_k, cols=layout.cols, width=layout.width, PLANES=planes,
                **layout.gate_constants, BM=block, GB=groups, STAGES=stages, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
            down_prompt_kernel[(table.shape[0], triton.cdiv(layout.cols, wide))](
                pool.bytes, table, rows.order, *rows.inner, rows.outputs, pool.slot_bytes, *layout.down,
                cols=layout.cols, width=layout.width, PLANES=planes, **layout.down_constants, BM=block, BN=wide,
                GB=groups, STAGES=stages, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
            return
        hidden, inner = rows.hidden.values, rows.inner.values
        for source, out, offsets, cols, width, activation in (
            (hidden, inner, layout.gate_up, layout.cols, layout.width, layout.activation),
            (inner, rows.outputs, layout.down, layout.width, layout.cols, ""),
        ):
            grouped_kernel[(table.shape[0], triton.cdiv(width, 64))](
                pool.bytes, table, rows.order, source, out, pool.slot_bytes, offsets[0],
                top_k=state.top_k, cols=cols, rows=width, DTYPE=layout.dtype, DOT=dot_dtype(hidden.dtype, hidden.device),
                ACT=activation, BM=block, BN=64, BK=64, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def _empty_rows(layout: DeviceLayout, rows: int, cols: int, like: torch.Tensor) -> _Rows:
    """Room for ``rows`` inputs of a product of ``cols`` columns, on ``like``'s device and, of unquantized experts, in its dtype."""
    if not layout.planes:
        values = like.new_empty(rows, cols)
        return _Rows(values, values, values)
    groups = padded(cols) // 64
    scales, sums = (torch.empty(rows, groups, device=like.device) for _ in range(2))
    wide = 64 if layout.planes == 8 else 128  # see ``store_codes``
    return _Rows(torch.empty(rows, groups * wide, dtype=torch.int8, device=like.device), scales, sums)


def _rows(layout: DeviceLayout, hidden: torch.Tensor) -> _Rows:
    """``hidden`` [T, cols] as input of ``layout``'s first product."""
    if not layout.planes:
        return _Rows(hidden, hidden, hidden)
    tokens, cols = hidden.shape
    made = _empty_rows(layout, tokens, cols, hidden)
    groups = made.scales.shape[1]
    quantize_rows_kernel[(tokens, triton.cdiv(groups, _QUANTIZED))](
        hidden, *made, cols=cols, groups=groups, PLANES=layout.planes, BG=_QUANTIZED, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return made


def prompt_tile(planes: int) -> tuple[int, int, int, int]:
    """(rows of a program of down, groups read at once, warps, blocks of groups that are on their way)."""
    return 128, 4 if planes != 8 else 2, 4, 3


def dot_dtype(dtype: torch.dtype, device: torch.device) -> Any:
    """Triton's name of the dtype that products are made in: fp32 on the CPU, whose interpreter has no bf16 product."""
    kinds = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return kinds.get(dtype, tl.float32) if device.type == "cuda" else tl.float32
