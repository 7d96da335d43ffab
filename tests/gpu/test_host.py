"""The tier below VRAM: what the device asks for is what it gets, and what cannot be read is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fate_moe.core import ExpertId, Need
from fate_moe.errors import ClosedModelError, StoreError
from fate_moe.gpu.host import DiskBelow, read_all
from fate_moe.gpu.memory import PinnedArena
from fate_moe.gpu.options import DeviceOptions
from fate_moe.kernels.elementary import combine
from fate_moe.memory.precision import PrefillPopularity
from fate_moe.memory.residency import Residency
from fate_moe.registry import make_policy
from tests.support.device import CPU, Model, random_model, route, twin
from tests.support.sources import MemorySource, SourceDouble

pytestmark = pytest.mark.slow


def source_of(model: Model) -> SourceDouble:
    """The model's experts, each a millisecond away."""
    experts = [ExpertId(layer, number) for layer in range(len(model.routers)) for number in range(model.num_experts)]
    blobs = {expert: bytes(model.arena.slots.view(slot)) for slot, expert in enumerate(experts)}
    ends = [section.offset + section.length for section in model.layout.sections]
    return SourceDouble(MemorySource(blobs, ends), 1e-3)


def below(model: Model, num_places: int) -> tuple[DiskBelow, SourceDouble]:
    source, arena = source_of(model), PinnedArena(num_places, model.layout.length, CPU)
    policy = make_policy("lru", num_places, [model.num_experts] * len(model.routers))
    return DiskBelow(Residency(source, arena.slots, policy), arena, model.num_experts, CPU), source


def outputs(model: Model, host: DiskBelow | PinnedArena, tokens: int) -> list[torch.Tensor]:
    """Of four passes of ``tokens`` tokens through every layer, with few slots in VRAM."""
    experts = model.experts(3 * len(model.routers), DeviceOptions(limit=0), host=host)
    random = torch.Generator().manual_seed(5)
    made = []
    for _ in range(4):
        for layer in range(len(model.routers)):
            hidden = torch.randn(tokens, model.hidden, generator=random)
            made.append(experts.compute(layer, hidden, *route(model, layer, hidden)))
    experts.state.tables.check_integrity()
    return made


@pytest.mark.parametrize("tokens", [1, 20])
def test_same_bits_with_the_disk_below(tokens: int) -> None:
    model = random_model("lossless", layers=2, experts=6)
    expected = outputs(model, model.arena, tokens)
    host, source = below(model, 4)
    assert all(map(torch.equal, outputs(model, host, tokens), expected))
    host.check()
    assert len(source.reads) > 12, "all experts fitted; nothing was shown"
    assert host.counters().bytes_read == len(source.reads) * model.layout.length
    host.close()
    host.residency.check_integrity()
    with pytest.raises(ClosedModelError, match="closed"):
        host.check()


def test_what_cannot_be_read_ends_the_wait_and_is_raised() -> None:
    model = random_model("lossless", layers=1, experts=6)
    host, source = below(model, 4)
    experts = model.experts(3, DeviceOptions(limit=0), host=host)
    hidden = torch.randn(1, model.hidden, generator=torch.Generator().manual_seed(1))
    index, weights = torch.tensor([[5, 4]]), torch.ones(1, 2)
    source.fails[ExpertId(0, 5)] = 1
    experts.compute(0, hidden, index, weights)
    for _ in range(2):  # for good: the device believes that it has the expert
        with pytest.raises(StoreError, match="expert 5 differs"):
            host.check()
        experts.compute(0, hidden, torch.tensor([[0, 1]]), weights)
    host.close()


def test_all_are_read_in_their_places() -> None:
    model = random_model("lossless", layers=2, experts=3)
    arena, seen = PinnedArena(6, model.layout.length, CPU), []
    read_all(source_of(model), arena, 2, 3, 2, lambda num_bytes, remark="": seen.append(num_bytes))
    assert torch.equal(arena.bytes, model.arena.bytes)
    assert sum(seen) == arena.bytes.numel()


def test_prefill_takes_short_views_of_the_tail_alone() -> None:
    """Least popular experts come with 3 bits, from the disk too; what decode needs afterwards is whole."""
    model = random_model("int4", layers=1, experts=4)
    host, _ = below(model, 3)
    experts = model.experts(3, DeviceOptions(limit=0), host=host, precision=PrefillPopularity(share=0.25, bits=3))
    hidden = torch.randn(20, model.hidden, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([[3, 0]] * 4 + [[0, 1]] * 16)  # expert 3, which has no slot, has a tenth of the choices
    weights = torch.full((20, 2), 0.5)
    assert experts._prefill._short_views(0, [3], {0: 20, 1: 16, 3: 4}) == {3: 2}
    got = experts.compute(0, hidden, index, weights)
    whole = twin(model, 0, hidden, index, weights)
    tail, rest = (twin(model, 0, hidden[:4], index[:4, i : i + 1], torch.ones(4, 1), planes) for i, planes in ((0, 2), (1, None)))
    assert torch.equal(got[:4], combine(torch.stack([tail, rest], 1), weights[:4]))
    assert torch.equal(got[4:], whole[4:])
    assert (got[:4] - whole[:4]).abs().max() > 1e-2
    assert torch.equal(experts.compute(0, hidden[:1], index[:1], weights[:1]), whole[:1])
    host.close()


@pytest.mark.parametrize(
    ("views", "bits", "planes"),
    [((2, 3, 4), 2, 1), ((4, 6, 8), 6, 2), ((4, 8), 4, 1), ((2, 3, 4), 4, None), ((8,), 8, None), ((), 3, None)],
)
def test_views_are_the_layouts(views: tuple[int, ...], bits: int, planes: int | None) -> None:
    """Prefill asks the precision policy for one of the views that the layout has, and copies that many planes."""
    asked: list[Sequence[int]] = []

    class Fixed:
        def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
            asked.append(views)
            assert [need.held for need in needs] == [views[-1], 0]
            return [bits] * len(needs)

    model = random_model("int4", layers=1, experts=4)
    experts = model.experts(3, precision=Fixed())
    assert experts.state.layouts[0].views == (2, 3, 4)
    experts.state.layouts = [replace(experts.state.layouts[0], views=views)]
    short = experts._prefill._short_views(0, [3], {0: 20, 3: 4})
    assert short == ({} if planes is None else {3: planes})
    assert asked == ([views] if len(views) > 1 else [])
