"""Several rows in one fused step, on a simulated device: each has the bits that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fate_moe.adapter.kv_cache import whole_cache
from fate_moe.layers.cuda_step import FusedStep
from tests.layers.test_cuda_step import on_device
from tests.support.checkpoints import tiny_model

pytestmark = pytest.mark.slow

# (token, position, blocks of its sequence): two rows of one sequence, across the border of a block, between those of others.
ROWS = [(3, 63, [2, 0, 1]), (17, 64, [2, 0, 1]), (40, 5, [3, 3, 3])]


def steps_of(family: str, num_slots: int, groups: list[list[int]], rows: int, **options: Any) -> tuple[torch.Tensor, FusedStep]:
    """Logits [3, vocabulary] of ROWS, in steps of these ``groups`` of them, over a cache full of random keys and values."""
    model = tiny_model(family)
    device = on_device(model, num_slots, **options)
    cache = whole_cache(model.config, 250)  # the last block is not whole
    with torch.no_grad():
        model(torch.tensor([[3]]), past_key_values=cache)
    random = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.keys.normal_(generator=random)
        layer.values.normal_(generator=random)
    fused, found = FusedStep(model, device, cache), []
    for group in groups:
        for at, (token, position, blocks) in enumerate(ROWS[number] for number in group):
            fused.ids[at], fused.positions[at] = token, position
            fused.table[at, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        fused.live.fill_(len(group))
        fused.step(rows)
        found.append(fused.all_logits[: len(group)].clone())
    device.state.tables.check_integrity()
    return torch.cat(found), fused


@pytest.mark.parametrize(("family", "slots"), [("qwen2_moe", 16), ("mixtral", 6)])
def test_a_rows_bits_are_those_it_has_alone(family: str, slots: int) -> None:
    alone, _ = steps_of(family, 16, [[0], [1], [2]], rows=1)
    together, fused = steps_of(family, slots, [[0, 1, 2]], rows=4)
    assert torch.equal(together, alone)
    misses = fused._experts.state.counters().misses
    assert (misses == 0) == (slots == 16)
