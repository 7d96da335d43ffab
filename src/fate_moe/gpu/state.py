"""What decode and prefill of one model have in common on the device: where experts lie, who is where, and how both may move them.

``gpu/experts.py`` (decode) and ``gpu/prefill.py`` both build on this and know nothing of each other's state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fate_moe.core import Counters, PrecisionPolicy
from fate_moe.gpu.host import HostTier, WholeHost
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.layout import DeviceLayout
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.streams import Lane
from fate_moe.gpu.tables import ResidencyTables

__all__ = ["MAX_DECODE_TOKENS", "DeviceState", "padded"]

# More tokens than this go through the grouped kernels: a decode program reads its expert's weights for one token alone.
MAX_DECODE_TOKENS = 16


class DeviceState:
    """Experts of all MoE layers in a pool of slots over host memory, where expert e of layer l is number ``l * num_experts + e``.

    layouts: of each layer. host: where missing experts come from. pool, tables: the slots, and who has them. routers: each layer's
    weight [num_experts, hidden], None where it has none that can be applied early. fitted: [num_experts, hidden + 1] predicts a
    layer from the router input before, better than its router does; None where the router does. precision: how many bits of each
    missing expert prefill copies (None: all). host_compute: computes on the CPU what ``shares`` gives it, else None.

    shares int32 [num_experts + 1]: of m misses of a layer, the host computes ``shares[m]``.

    Decode's buffers: staged fp32 [MAX_DECODE_TOKENS, padded hidden], the activations in the kernels' order; slots and pending int32
    [rows], of each choice row (token * top_k + choice) its slot (-1: none) and whether its expert is on its way (see
    ``residency_kernel``).

    ``options`` and ``precision`` may be replaced between passes; a recorded step keeps those that it was recorded with.
    """

    def __init__(
        self,
        layouts: Sequence[DeviceLayout],
        host: HostTier | PinnedArena,
        pool: VramPool,
        tables: ResidencyTables,
        routers: Sequence[torch.Tensor | None],
        *,
        top_k: int,
        options: DeviceOptions | None = None,
        host_compute: HostCompute | None = None,
        precision: PrecisionPolicy | None = None,
        fitted: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """``host``: an arena alone holds every expert at its own place. ``fitted`` may be empty: routers predict.

        Raises ValueError for a ``host_compute`` over a host that does not hold every expert at its own place.
        """
        self.layouts, self.pool, self.tables = list(layouts), pool, tables
        self.host: HostTier = WholeHost(host) if isinstance(host, PinnedArena) else host
        self.top_k, self.options, self.precision = top_k, options or DeviceOptions(), precision
        self.routers = list(routers)
        self.fitted = list(fitted) or [None] * len(self.routers)
        self.host_compute = host_compute if self.options.host_compute != 0 else None
        if self.host_compute is not None and not isinstance(self.host, WholeHost):
            raise ValueError("the host computes misses only where it holds every expert at its own place")
        self.shares = torch.zeros(tables.num_experts + 1, dtype=torch.int32, device=self.device)
        self.share(self.options.hosted(top_k))
        rows = MAX_DECODE_TOKENS * top_k
        self.staged = torch.zeros(MAX_DECODE_TOKENS, padded(self.layouts[0].cols), dtype=torch.float32, device=self.device)
        self.slots = torch.full((rows,), -1, dtype=torch.int32, device=self.device)
        self.pending = torch.zeros(rows, dtype=torch.int32, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the pool is."""
        return self.pool.bytes.device

    def share(self, hosted: Sequence[int]) -> None:
        """Of m misses of a layer let the host compute ``hosted[m]``, of more than one token has that part of them; from the next
        step on, recorded or not."""
        most = min(self.top_k, len(hosted) - 1)
        self.hosted_most = hosted[most]
        more = (misses * hosted[most] // most for misses in range(most + 1, self.tables.num_experts + 1))
        self.shares.copy_(torch.tensor([*hosted[: most + 1], *more], dtype=torch.int32))

    def stop_host_compute(self) -> None:
        """Let the link bring every miss; the device must have ended its work, and steps be recorded anew."""
        if self.host_compute is not None:
            self.host_compute.close()
        self.host_compute = None
        self.share([0] * (self.top_k + 1))

    def is_whole(self, layer: int) -> bool:
        """Whether every expert of ``layer`` has a slot."""
        return self.tables.quotas[layer] == self.tables.num_experts

    def fill(self) -> None:
        """Copy every resident's bytes to its slot."""
        residents = [(layer * self.tables.num_experts + expert, slot) for layer, expert, slot in self.tables.residents()]
        lane = Lane(self.device, False)
        self.host.copy(residents, self.pool, lane)
        lane.synchronize()

    def counters(self) -> Counters:
        """What the decode steps did so far; waits for the device."""
        return self.tables.counted(self.layouts[0].blob_bytes)

    def close(self) -> None:
        """Stop the host's threads and give its memory back; the device must have ended its work."""
        if self.host_compute is not None:
            self.host_compute.close()
        self.host.close()


def padded(cols: int) -> int:
    """``cols`` rounded up to whole groups of 64, as the kernels read activations."""
    return -(-cols // 64) * 64
