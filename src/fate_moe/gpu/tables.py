"""Who is where on the device: the tables that the residency kernels move."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fate_moe.core import Counters

__all__ = ["ResidencyTables", "layer_quotas"]


def layer_quotas(num_slots: int, num_layers: int, num_experts: int, min_slots: int, num_whole: int) -> list[int]:
    """Slots of each layer; they sum to ``num_slots``, or to all experts. None has fewer than ``min_slots`` (one pass's experts).

    The first ``num_whole`` layers get all their experts as long as they take at most half of the slots (layer 0 has no predecessor
    to predict it, and shallow layers predict worst: Fate, arXiv 2502.12224, section 4.2); the others divide the rest evenly.
    Raises ValueError when there are fewer than ``min_slots`` slots a layer.
    """
    if num_slots < min_slots * num_layers:
        raise ValueError(f"{num_slots} slots for {num_layers} layers that need {min_slots} each")
    whole = 0
    while whole < num_whole and (whole + 1) * num_experts <= num_slots // 2:
        whole += 1
    while whole and num_slots - whole * num_experts < min_slots * (num_layers - whole):
        whole -= 1
    even, odd = divmod(num_slots - whole * num_experts, max(1, num_layers - whole))
    return [num_experts] * whole + [min(num_experts, even + (i < odd)) for i in range(num_layers - whole)]


class ResidencyTables:
    """What ``kernels/triton_residency.py`` describes, all on one device. Slots are numbered layer by layer and always full."""

    def __init__(self, quotas: Sequence[int], num_experts: int, device: torch.device) -> None:
        self.quotas, self.num_experts = list(quotas), num_experts
        shape = (len(quotas), num_experts)
        slot_of = torch.full(shape, -1, dtype=torch.int32)
        first = 0
        for layer, quota in enumerate(quotas):
            slot_of[layer, :quota] = torch.arange(first, first + quota, dtype=torch.int32)
            first += quota
        self.num_slots = first
        self._initial = slot_of
        self.slot_of = slot_of.to(device)
        self.score = torch.zeros(shape, dtype=torch.float32, device=device)
        self.unused = torch.zeros(shape, dtype=torch.int32, device=device)
        self.counters = torch.zeros(len(quotas), 5, dtype=torch.int64, device=device)
        self.clock = torch.ones(1, dtype=torch.int32, device=device)

    def residents(self) -> list[tuple[int, int, int]]:
        """(layer, expert, slot) of every resident; waits for the device."""
        table = self.slot_of.cpu()
        return [(layer, expert, int(table[layer, expert])) for layer, expert in (table >= 0).nonzero().tolist()]

    def counted(self, blob_bytes: int) -> Counters:
        """The counters of all layers together; waits for the device."""
        hits, misses, prefetched, used, hosted = self.counters.sum(0).tolist()
        bytes_read = (misses - hosted + prefetched) * blob_bytes
        return Counters(hits=hits, misses=misses, prefetched=prefetched, prefetch_used=used, bytes_read=bytes_read)

    def hosted(self) -> int:
        """How many of the misses the host computed; waits for the device."""
        return int(self.counters[:, 4].sum())

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every layer's slots are its own, all taken, each by one expert; waits for the device."""
        table = self.slot_of.cpu()
        first = 0
        for layer, quota in enumerate(self.quotas):
            taken = sorted(table[layer][table[layer] >= 0].tolist())
            if taken != list(range(first, first + quota)):
                raise RuntimeError(f"layer {layer} has slots {taken} instead of {first} to {first + quota - 1}, each once")
            first += quota
