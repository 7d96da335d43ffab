"""The experts of a model on the device: route -> residency -> fetch -> (prefetch the next) -> compute.

Everything is enqueued; nothing here waits for the device or reads from it, so a decode step can be captured in one CUDA graph as
it is. On a CPU device the same launches run one after another under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from fate_moe.core import Counters, PrecisionPolicy
from fate_moe.gpu.host import HostTier, WholeHost
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.layout import DeviceLayout
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.prefill import Prefill
from fate_moe.gpu.streams import Lane
from fate_moe.gpu.tables import ResidencyTables
from fate_moe.kernels.triton_experts import down_kernel, gate_up_kernel
from fate_moe.kernels.triton_fetch import fetch_kernel
from fate_moe.kernels.triton_residency import logits_kernel, prefetch_kernel, residency_kernel, route_kernel

__all__ = ["MAX_DECODE_TOKENS", "DeviceExperts"]

Beside = Callable[[], None] | None

# More tokens than this go through the grouped kernels: a decode program reads its expert's weights for one token alone.
MAX_DECODE_TOKENS = 16

# 16 KiB a program and step: with 8 warps four 16-byte loads are in flight per thread.
_FETCH_WORDS = 4096


class DeviceExperts:
    """Runs MoE blocks whose experts live in a pool of slots over host memory, there as expert ``layer * num_experts + expert``.

    Law 1: a row of output depends on its token and its experts' bytes alone, and choices are summed in routing order, so neither
    the number of slots nor the options change a bit.
    """

    def __init__(
        self,
        layouts: Sequence[DeviceLayout],
        host: HostTier | PinnedArena,
        pool: VramPool,
        tables: ResidencyTables,
        gates: Sequence[torch.Tensor | None],
        *,
        top_k: int,
        options: DeviceOptions | None = None,
        share: HostCompute | None = None,
        precision: PrecisionPolicy | None = None,
        fitted: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """``host`` is where misses come from; an arena alone holds all experts. ``gates[l]`` is the weight [num_experts, hidden] of
        layer l's router, None where it has none that can be applied early.
        ``share`` computes what ``options.host_compute`` leaves to the host;
        ``precision`` says how many bits of each missing expert prefill copies (None: all).
        ``fitted[l]`` [num_experts, hidden + 1] predicts layer l from the gate input before in a fused step, better than its router
        (store/learned.py: Gates.ahead[0]); None or absent: the router does."""
        self.precision = precision
        self.layouts, self.pool, self.tables, self.gates = list(layouts), pool, tables, list(gates)
        self.host: HostTier = WholeHost(host) if isinstance(host, PinnedArena) else host
        self.top_k, self.options = top_k, options or DeviceOptions()
        device = pool.bytes.device
        first = self.layouts[0]
        rows = MAX_DECODE_TOKENS * top_k
        self.staged = torch.zeros(MAX_DECODE_TOKENS, _padded(first.cols), dtype=torch.float32, device=device)
        self._inner = torch.zeros(rows, max(_padded(layout.width) for layout in layouts), dtype=torch.float32, device=device)
        self.slots = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.pending = torch.zeros(rows, dtype=torch.int32, device=device)
        self._logits = torch.zeros(MAX_DECODE_TOKENS, tables.num_experts, dtype=torch.float32, device=device)
        lists = torch.zeros(3, tables.num_experts + 1, 2, dtype=torch.int32, device=device)
        self._demand = lists[0]  # pairs (blob, slot); the last row's first entry is their number
        self._ahead = lists[1], lists[2]  # for even and odd layers: one is still read while the next is written
        self._main, self._demands, self._prefetches, self._answers = (Lane(device, side) for side in (False, True, True, True))
        self._share = share if self.options.host_compute > 0 else None
        if self._share is not None and not isinstance(self.host, WholeHost):
            raise ValueError("the host computes misses only where it holds every expert at its own place")
        self._asked = False  # the residency step may have asked the host for rows that nobody collects yet
        self._listed = False  # the residency step listed prefetches that are not enqueued yet
        self._arriving: Any = None  # the mark of prefetches that the main lane has not waited for
        self.fitted = list(fitted) or [None] * len(self.gates)
        self._exact = all(gate is None or gate.dtype == torch.float32 for gate in gates)
        self._prefill = Prefill(self)

    def fill(self) -> None:
        """Copy every resident's bytes to its slot."""
        residents = [(layer * self.tables.num_experts + expert, slot) for layer, expert, slot in self.tables.residents()]
        self.host.copy(residents, self.pool, self._main)
        self._main.synchronize()

    def compute(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs [T, hidden]; ``index`` and ``routing_weights`` are [T, top_k]."""
        tokens, top_k = index.shape
        if tokens > MAX_DECODE_TOKENS:
            return self._prefill.compute(layer, hidden, index, routing_weights)
        hidden = hidden.contiguous()
        quota = self.tables.quotas[layer]
        if tokens * top_k <= min(self.host.most, quota - (quota < self.tables.num_experts) * self.options.limit):
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
        whole = self.tables.quotas[layer] == self.tables.num_experts
        tokens = out.shape[0]
        prefetched, self._arriving = self._arriving, None
        share, self._asked = self._share if self._asked else None, False
        if share is not None:
            self._answers.follow(self._main)
            with self._answers:
                share.collect(self.pending)
        if not whole:
            self._demands.follow(self._main)
            with self._demands:
                self.host.locate(self._demand)
                self.fetch(self._demand)
        if self._listed:
            if not whole:
                self._prefetches.follow(self._demands)  # law 3: what is needed now goes first
            with self._prefetches:
                self.fetch(self._ahead[(layer + 1) % 2])
            self._arriving, self._listed = self._prefetches.mark(), False
        if whole or not self.options.overlap:
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
        if share is not None:
            self._main.follow(self._answers)
        self._down(layer, routing_weights, out, add, share)

    def close(self) -> None:
        """Stop the host's threads and give its memory back; the device must have ended its work."""
        if self._share is not None:
            self._share.close()
        self.host.close()

    def counters(self) -> Counters:
        """What the decode steps did so far; waits for the device."""
        return self.tables.counted(self.layouts[0].blob_bytes)

    def route(
        self,
        layer: int,
        logits: torch.Tensor,
        next_logits: torch.Tensor,
        hidden: torch.Tensor,
        routing_weights: torch.Tensor,
        normalize: bool,
    ) -> None:
        """One token's routing, residency step and prefetch list from router logits: see ``route_kernel``. Then ``run``.

        ``hidden`` [hidden] is the gate input, which the host is given if it computes misses.
        """
        tables, options, share = self.tables, self.options, self._share
        ahead, listed = self._looks_ahead_to(layer + 1), self._ahead[(layer + 1) % 2]
        plain = not ahead or self.fitted[layer + 1] is None  # what a fitted gate says is no softmax's input: its order alone counts
        self._asked = share is not None and tables.quotas[layer] < tables.num_experts
        questions, asked, most = (share.questions, share.asked, share.most) if share is not None else (listed, listed, 0)
        route_kernel[(1 + ahead,)](
            logits, next_logits, routing_weights, self.slots, self.pending, self._demand, self._demand[-1], listed, listed[-1],
            tables.slot_of, tables.score, tables.unused, tables.counters, tables.clock, layer, len(self.layouts) - 1,
            options.half_life, options.num_predicted or self.top_k, options.min_probability if plain else 0.0, options.limit,
            1 - options.host_compute, questions, asked, hidden,
            num_experts=tables.num_experts, top_k=self.top_k, cols=self.layouts[layer].cols,
            NORMALIZE=normalize, FREQUENCY=options.eviction != "recency", WEIGHED=options.eviction == "probability",
            HOST=self._asked, MOST=most,
            E=triton.next_power_of_2(tables.num_experts), R=triton.next_power_of_2(self.top_k), num_warps=4,
        )  # fmt: skip
        if ahead:
            self._prefetches.follow(self._main)
            self._listed = True

    def _looks_ahead_to(self, layer: int) -> bool:
        known = layer < len(self.layouts) and self.gates[layer] is not None
        return known and self.options.limit > 0 and self.tables.quotas[layer] < self.tables.num_experts

    def _route(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> None:
        tables, options = self.tables, self.options
        tokens, cols = hidden.shape
        residency_kernel[(1 + tokens,)](
            index, hidden, self.staged, self.slots, self.pending, self._demand, self._demand[-1],
            tables.slot_of, tables.score, tables.unused, tables.counters, tables.clock, layer, len(self.layouts) - 1,
            options.half_life, num_experts=tables.num_experts, num_rows=index.numel(), cols=cols, PLANES=self.layouts[layer].planes,
            FREQUENCY=options.eviction != "recency", E=triton.next_power_of_2(tables.num_experts),
            R=triton.next_power_of_2(index.numel()), BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def _look_ahead(self, layer: int, hidden: torch.Tensor) -> None:
        """List what the layer after ``layer`` will probably choose, on a lane of its own."""
        tables, options = self.tables, self.options
        if not self._looks_ahead_to(layer + 1):
            return
        listed = self._ahead[(layer + 1) % 2]
        self._prefetches.follow(self._main)
        with self._prefetches:
            tokens, cols = hidden.shape
            logits_kernel[(tokens, triton.cdiv(tables.num_experts, 4))](
                hidden, self.gates[layer + 1], self._logits, cols=cols, num_experts=tables.num_experts, BE=4, BLOCK=512, num_warps=4
            )
            prefetch_kernel[(1,)](
                self._logits, listed, listed[-1], tables.slot_of, tables.score, tables.unused, tables.counters, tables.clock,
                layer + 1, tokens, options.num_predicted or self.top_k, options.min_probability, options.limit,
                num_experts=tables.num_experts, FREQUENCY=options.eviction != "recency",
                E=triton.next_power_of_2(tables.num_experts), num_warps=8,
            )  # fmt: skip
        self._listed = True

    def fetch(self, wanted: torch.Tensor) -> None:
        """Enqueue the copies of the (place, slot) pairs in ``wanted``: see ``fetch_kernel``."""
        blob_bytes = self.layouts[0].blob_bytes
        fetch_kernel[(self.options.fetch_programs,)](
            self.host.bytes, self.pool.bytes, wanted, wanted[-1], blob_bytes, self.pool.slot_bytes, BLOCK=_FETCH_WORDS, num_warps=8
        )

    def _gate_up(self, layer: int, tokens: int, phase: int) -> None:
        layout = self.layouts[layer]
        block, groups, warps = gate_up_tile(layout)
        gate_up_kernel[(tokens * self.top_k, triton.cdiv(_padded(layout.width), block))](
            self.pool.bytes, self.slots, self.pending, self.staged, self._inner, self.pool.slot_bytes, *layout.gate_up,
            top_k=self.top_k, cols=layout.cols, width=layout.width, DTYPE=layout.dtype, PLANES=layout.planes,
            EXACT=self._exact, ACT=layout.activation, PHASE=phase, BN=block, GB=groups, num_warps=warps,
        )  # fmt: skip

    def _down(
        self, layer: int, routing_weights: torch.Tensor, out: torch.Tensor, add: bool, share: HostCompute | None = None
    ) -> None:
        layout = self.layouts[layer]
        choices, block, groups, warps = down_tile(layout, self.top_k)
        down_kernel[(out.shape[0], triton.cdiv(layout.cols, block))](
            self.pool.bytes, self.slots, self.pending, self._inner, self._inner if share is None else share.outside,
            routing_weights, out, out, self.pool.slot_bytes, *layout.down, top_k=self.top_k, cols=layout.cols, width=layout.width,
            DTYPE=layout.dtype, PLANES=layout.planes, EXACT=self._exact, RESIDUAL=add, HOST=share is not None,
            KP=choices, BN=block, GB=groups, num_warps=warps,
        )  # fmt: skip


def gate_up_tile(layout: DeviceLayout) -> tuple[int, int, int]:
    """(gate rows and up rows of a program, groups at once, warps)."""
    if layout.planes in (0, 8):
        return 4, min(32, triton.next_power_of_2(_padded(layout.cols) // 64)), 4
    return 16, min(32, triton.next_power_of_2(_padded(layout.cols) // 64)), 8


def down_tile(layout: DeviceLayout, top_k: int) -> tuple[int, int, int, int]:
    """(choices, rounded up; output rows of a program; groups at once; warps): a tile of 32 rows, one per choice and output.

    Four groups at once: 7.2 us for 8 experts of Qwen3-30B-A3B on an H200 where 16 take 10.0, of which they leave four idle; 32 at
    once take 111 for 4 INT8 experts of Qwen1.5-MoE.
    """
    choices = triton.next_power_of_2(top_k)
    groups = min(4, triton.next_power_of_2(_padded(layout.width) // 64))
    return choices, max(1, 32 // choices), groups, 4


def _padded(cols: int) -> int:
    return -(-cols // 64) * 64
