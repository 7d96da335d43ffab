"""The experts of a model on the device: route -> residency -> fetch -> (prefetch the next) -> compute.

Everything is enqueued; nothing here waits for the device or reads from it, so a decode step can be captured in one CUDA graph as
it is. On a CPU device the same launches run one after another under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from fate_moe.gpu.device import launches_early
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.layout import DeviceLayout
from fate_moe.gpu.prefill import Prefill
from fate_moe.gpu.state import MAX_DECODE_TOKENS, DeviceState, padded
from fate_moe.gpu.streams import Lane
from fate_moe.kernels.plain_layer import Router
from fate_moe.kernels.triton_experts import down_kernel, gate_up_kernel
from fate_moe.kernels.triton_fetch import fetch_kernel
from fate_moe.kernels.triton_residency import logits_kernel, prefetch_kernel, residency_kernel, route_kernel
from fate_moe.kernels.triton_router import choose_kernel

__all__ = ["DeviceExperts"]

Beside = Callable[[], None] | None

# 16 KiB a program and step: with 8 warps four 16-byte loads are in flight per thread.
_FETCH_WORDS = 4096
_CHOICES = 1 << 14  # rows of choices times experts that routing's one program can have: it sums them up in 64 KiB


class DeviceExperts:
    """Runs MoE blocks from the experts of ``state``: decode here, more than MAX_DECODE_TOKENS tokens through ``Prefill``.

    Same numbers: a row of output depends on its token and its experts' bytes alone, and choices are summed in routing order, so
    neither the number of slots nor the options change a bit.
    """

    def __init__(self, state: DeviceState) -> None:
        self.state = state
        device, tables = state.device, state.tables
        widest = max(padded(layout.width) for layout in state.layouts)
        self._inner = torch.zeros(MAX_DECODE_TOKENS * state.top_k, widest, dtype=torch.float32, device=device)
        self._logits = torch.zeros(MAX_DECODE_TOKENS, tables.num_experts, dtype=torch.float32, device=device)
        self._choices = torch.zeros(MAX_DECODE_TOKENS * state.top_k, dtype=torch.int32, device=device)
        self._chances = torch.zeros_like(self._logits)
        lists = torch.zeros(3, tables.num_experts + 1, 2, dtype=torch.int32, device=device)
        self._demand = lists[0]  # pairs (blob, slot); the last row's first entry is their number
        self._ahead = lists[1], lists[2]  # for even and odd layers: one is still read while the next is written
        self._main, self._demands, self._prefetches, self._host_results = (Lane(device, side) for side in (False, True, True, True))
        self._behind = torch.zeros(len(state.layouts), 2, 2, dtype=torch.int32, device=device)  # pair, number
        self._trailing = False  # copies behind the step that the main lane has not waited for
        self._requested = False  # the residency step may have requested rows from the host that nobody collects yet
        self._listed = False  # the residency step listed prefetches that are not enqueued yet
        self._arriving: Any = None  # the mark of prefetches that the main lane has not waited for
        self._launches_early = launches_early(device)
        self._prefill = Prefill(state)

    def compute(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs [T, hidden]; ``index`` and ``routing_weights`` are [T, top_k]."""
        state, (tokens, top_k) = self.state, index.shape
        if tokens > MAX_DECODE_TOKENS:
            return self._prefill.compute(layer, hidden, index, routing_weights)
        hidden = hidden.contiguous()
        room = state.tables.quotas[layer] - (0 if state.is_whole(layer) else state.options.limit)
        if tokens * top_k <= min(state.host.most, room):
            return self._compute(layer, hidden, index.contiguous(), routing_weights.contiguous(), look_ahead=True)
        # A row does not depend on its neighbours, so that the same numbers come out one by one.
        rows = [(hidden[t : t + 1], index[t : t + 1], routing_weights[t : t + 1]) for t in range(tokens)]
        return torch.cat([self._compute(layer, *row, look_ahead=False) for row in rows])

    def _compute(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, routing_weights: torch.Tensor, look_ahead: bool
    ) -> torch.Tensor:
        self._route(layer, hidden, index)
        if look_ahead:
            self._look_ahead(layer, hidden)
        out = torch.empty_like(hidden)
        self.run(layer, routing_weights, out)
        return out

    def run(
        self, layer: int, routing_weights: torch.Tensor, out: torch.Tensor, *, add: bool = False, beside: Beside = None
    ) -> None:
        """Fetch what the residency step listed and compute the routed rows into ``out`` [T, hidden], adding to what is there if
        ``add``.

        ``beside`` enqueues work of the main lane that needs no expert: it runs while missing experts are fetched.
        """
        state, tokens, whole = self.state, out.shape[0], self.state.is_whole(layer)
        prefetched, self._arriving = self._arriving, None
        host_compute, self._requested = state.host_compute if self._requested else None, False
        if host_compute is not None:
            self._host_results.follow(self._main)
            with self._host_results:
                host_compute.collect(state.pending[: tokens * state.top_k])
        if not whole:
            self._demands.follow(self._main)
            with self._demands:
                state.host.locate(self._demand)
                self.fetch(self._demand)
        if self._listed:
            if not whole:
                self._prefetches.follow(self._demands)  # never slower than not trying: what is needed now goes first
            with self._prefetches:
                self.fetch(self._ahead[(layer + 1) % 2])
            self._arriving, self._listed = self._prefetches.mark(), False
        if host_compute is not None and state.options.admit_every:
            self._prefetches.follow(self._demands)
            with self._prefetches:
                self.fetch(self._behind[layer])
            self._trailing = True
        if whole or not state.options.overlap:
            if beside is not None:
                beside()
            if not whole:
                self._main.follow(self._demands)
            self._main.wait(prefetched)
            self._gate_up(layer, tokens, phase=2)
        else:  # pending rows on the lane that brings them: where none is, the main lane has one launch, as if all were resident
            self._demands.wait(prefetched)
            with self._demands:
                self._gate_up(layer, tokens, phase=1)
            if beside is not None:
                beside()
            self._gate_up(layer, tokens, phase=0)
            self._main.follow(self._demands)
        if host_compute is not None:
            self._main.follow(self._host_results)
        self._down(layer, routing_weights, out, add, host_compute)
        if self._trailing and layer == len(state.layouts) - 1:  # the next token finds them
            self._main.follow(self._prefetches)
            self._trailing = False

    def route(
        self,
        layer: int,
        logits: torch.Tensor,
        next_logits: torch.Tensor,
        hidden: torch.Tensor,
        routing_weights: torch.Tensor,
        router: Router,
        live: torch.Tensor,
        corrections: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        predicted: bool = False,
    ) -> None:
        """Routing, residency step and prefetch list of tokens, of which the first ``live`` int32 [1] are there, from logits
        [tokens, num_experts] of ``router``: see ``route_kernel``. Then ``run``.

        ``corrections``: this layer's and the next one's, [num_experts], where the router has them. ``predicted``: ``next_logits``
        [num_experts] are logarithms of probabilities, not those of the next layer's router. ``hidden`` [tokens, hidden] is the
        router input, which the host is given if it computes misses. At most ``most_tokens`` at once.
        """
        state, tables, options, mail = self.state, self.state.tables, self.state.options, self.state.host_compute
        tokens, top_k = routing_weights.shape
        ahead, listed = self._looks_ahead_to(layer + 1), self._ahead[(layer + 1) % 2]
        by_router = not predicted and (not ahead or state.fitted[layer + 1] is None)  # a fitted gate's logits have only an order
        softmax, (correction, next_correction) = router.scores == "softmax", corrections
        self._requested = mail is not None and not state.is_whole(layer)
        questions, asked, most = (mail.questions, mail.asked, mail.most) if mail is not None else (listed, listed, 0)
        experts, rows = triton.next_power_of_2(tables.num_experts), triton.next_power_of_2(tokens * top_k)
        correction = logits if correction is None else correction
        rule: dict[str, Any] = {
            "num_experts": tables.num_experts, "top_k": top_k, "SCORES": router.scores, "CORRECTED": router.correction is not None,
            "GROUPS": router.groups, "TOP_GROUPS": router.top_groups, "GROUP_BEST": router.group_best,
            "NORMALIZE": router.normalize, "ROUNDS": router.rounds_logits, "E": experts,
        }  # fmt: skip
        if tokens > 1:
            choose_kernel[(tokens,)](
                logits, correction, live, hidden, self._choices, routing_weights, self._chances, logits.stride(0),
                router.scale, router.floor, router.spread, R=triton.next_power_of_2(top_k), **rule, num_warps=4,
            )  # fmt: skip
        route_kernel[(1 + ahead,)](
            logits, next_logits, self._choices, self._chances, live, routing_weights, state.slots, state.pending, self._demand,
            self._demand[-1], listed, listed[-1], tables.slot_of, tables.score, tables.unused, tables.counters, tables.clock, layer,
            len(state.layouts) - 1, logits.stride(0), 0 if predicted else next_logits.stride(0), options.half_life,
            options.num_predicted or top_k, options.min_probability if predicted or (by_router and softmax) else 0.0,
            options.limit, state.shares, questions, asked, self._behind[layer], options.admit_every, state.pool.num_slots, hidden,
            correction, logits if next_correction is None else next_correction, router.scale, router.floor, router.spread,
            cols=state.layouts[layer].cols, TOKENS=tokens, SIGMOID_NEXT=by_router and router.scores == "sigmoid",
            FREQUENCY=options.eviction != "recency", WEIGHED=softmax and options.eviction == "probability",
            HOST=self._requested, ADMITS=self._requested and options.admit_every > 0, MOST=most, R=rows, **rule,
            num_warps=4 if rows * experts <= 4096 else 16,
        )  # fmt: skip
        if ahead:
            self._prefetches.follow(self._main)
            self._listed = True

    def note_pass(self) -> None:
        """A step of several tokens was enqueued, which may read the prompts' slots."""
        self._prefill.lend()

    def most_tokens(self, wanted: int) -> int:
        """How many tokens ``route`` takes at once: a power of two up to ``wanted`` (one always).

        Their experts find slots in each layer beside one layer's prefetches, and spare ones; one program knows all their choices.
        """
        state, experts = self.state, self.state.tables.num_experts
        partial = [quota for quota in state.tables.quotas if quota < experts]
        room = min([state.host.most, *(quota - state.options.limit + state.pool.num_staging for quota in partial)])
        tile, count = triton.next_power_of_2(experts), 1
        while 2 * count <= min(wanted, MAX_DECODE_TOKENS) and triton.next_power_of_2(2 * count * state.top_k) * tile <= _CHOICES:
            if partial and min(2 * count * state.top_k, experts) > room:
                break
            count *= 2
        return count

    def fetch(self, wanted: torch.Tensor) -> None:
        """Enqueue the copies of the (place, slot) pairs in ``wanted``: see ``fetch_kernel``."""
        state = self.state
        fetch_kernel[(state.options.fetch_programs,)](
            state.host.bytes, state.pool.bytes, wanted, wanted[-1], state.layouts[0].blob_bytes, state.pool.slot_bytes,
            BLOCK=_FETCH_WORDS, num_warps=8,
        )  # fmt: skip

    def _looks_ahead_to(self, layer: int) -> bool:
        state = self.state
        known = layer < len(state.layouts) and state.routers[layer] is not None
        return known and state.options.limit > 0 and not state.is_whole(layer)

    def _route(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> None:
        state, tables, options = self.state, self.state.tables, self.state.options
        tokens, cols = hidden.shape
        residency_kernel[(1 + tokens,)](
            index, hidden, state.staged, state.slots, state.pending, self._demand, self._demand[-1],
            tables.slot_of, tables.score, tables.unused, tables.counters, tables.clock, layer, len(state.layouts) - 1,
            options.half_life, num_experts=tables.num_experts, num_rows=index.numel(), cols=cols,
            PLANES=state.layouts[layer].planes, FREQUENCY=options.eviction != "recency",
            E=triton.next_power_of_2(tables.num_experts), R=triton.next_power_of_2(index.numel()), BLOCK=1024, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip

    def _look_ahead(self, layer: int, hidden: torch.Tensor) -> None:
        """List what the layer after ``layer`` will probably choose, on a lane of its own."""
        state, tables, options = self.state, self.state.tables, self.state.options
        if not self._looks_ahead_to(layer + 1):
            return
        listed = self._ahead[(layer + 1) % 2]
        self._prefetches.follow(self._main)
        with self._prefetches:
            tokens, cols = hidden.shape
            logits_kernel[(tokens, triton.cdiv(tables.num_experts, 4))](
                hidden, state.routers[layer + 1], self._logits, cols=cols, num_experts=tables.num_experts,
                BE=4, BLOCK=512, num_warps=4,
            )  # fmt: skip
            prefetch_kernel[(1,)](
                self._logits, listed, listed[-1], tables.slot_of, tables.score, tables.unused, tables.counters, tables.clock,
                layer + 1, tokens, options.num_predicted or state.top_k, options.min_probability, options.limit,
                num_experts=tables.num_experts, FREQUENCY=options.eviction != "recency",
                E=triton.next_power_of_2(tables.num_experts), num_warps=8,
            )  # fmt: skip
        self._listed = True

    def _early(self, layer: int) -> bool:
        """Whether down is launched while gate_up runs and reads its weights meanwhile; then nothing else may come between them."""
        return self._launches_early and self.state.layouts[layer].planes > 0 and self.state.is_whole(layer)

    def _gate_up(self, layer: int, tokens: int, phase: int) -> None:
        state, layout = self.state, self.state.layouts[layer]
        block, groups, rows, warps = gate_up_tile(layout)
        gate_up_kernel[(tokens * state.top_k, triton.cdiv(padded(layout.width), block))](
            state.pool.bytes, state.slots, state.pending, state.staged, self._inner, state.pool.slot_bytes, *layout.gate_up,
            top_k=state.top_k, cols=layout.cols, width=layout.width, DTYPE=layout.dtype, PLANES=layout.planes,
            PHASE=phase, **layout.gate_constants, BN=block, GB=groups, ROWS=rows, EARLY=self._early(layer),
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip

    def _down(
        self, layer: int, routing_weights: torch.Tensor, out: torch.Tensor, add: bool, host_compute: HostCompute | None = None
    ) -> None:
        state, layout = self.state, self.state.layouts[layer]
        choices, block, groups, rows, warps = down_tile(layout, state.top_k)
        early = self._early(layer)
        down_kernel[(out.shape[0], triton.cdiv(layout.cols, block))](
            state.pool.bytes, state.slots, state.pending, self._inner,
            self._inner if host_compute is None else host_compute.outside, routing_weights, out, out, state.pool.slot_bytes,
            *layout.down, top_k=state.top_k, cols=layout.cols, width=layout.width,
            DTYPE=layout.dtype, PLANES=layout.planes, **layout.down_constants, RESIDUAL=add, HOST=host_compute is not None,
            KP=choices, BN=block, GB=groups, ROWS=rows, EARLY=early, num_warps=warps, enable_fp_fusion=False,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip


def gate_up_tile(layout: DeviceLayout) -> tuple[int, int, int, int]:
    """(inner values of a program, lanes of a row or groups at once of unquantized experts, rows at once, warps)."""
    if layout.planes:
        lanes, warps = _lanes(layout.planes, layout.cols), 16
        return 64, lanes, min(64, warps * 32 // lanes), warps
    return 4, min(32, triton.next_power_of_2(padded(layout.cols) // 64)), 1, 4


def down_tile(layout: DeviceLayout, top_k: int) -> tuple[int, int, int, int, int]:
    """(choices, rounded up; output rows of a program; lanes of a row or groups at once; rows at once; warps): a tile of 32 rows,
    one per choice and output."""
    choices = triton.next_power_of_2(top_k)
    if layout.planes:
        lanes, warps = _lanes(layout.planes, layout.width), 4
        rows = max(choices, warps * 32 // lanes)
        return choices, max(32, rows) // choices, lanes, rows, warps
    return choices, max(1, 32 // choices), min(4, triton.next_power_of_2(padded(layout.width) // 64)), 1, 4


def _lanes(planes: int, cols: int) -> int:
    """Lanes that share a row: a group each, of one-byte codes a quarter of one."""
    groups = int(triton.next_power_of_2(padded(cols) // 64))
    return min(32, (4 if planes == 8 else 1) * max(4, groups))
