"""The residency kernels against plain Python over the policies (the production LRU among them), step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fate_moe.gpu.tables import ResidencyTables, layer_quotas
from fate_moe.kernels.triton_fetch import fetch_kernel
from fate_moe.kernels.triton_residency import logits_kernel, prefetch_kernel, residency_kernel
from fate_moe.memory.policies import LRU
from tests.support.gpu_twin import DecayedFrequency, Residency

pytestmark = pytest.mark.slow

EXPERTS, TOP_K, HALF_LIFE = 6, 2, 4.0
CPU = torch.device("cpu")

STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(-1, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True),  # layer 0's choices
        st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True),  # layer 1's
        st.permutations(range(EXPERTS)),  # likeliest first for layer 1
        st.integers(0, 3),  # predicted
        st.integers(0, 2),  # limit
    ),
    min_size=1,
    max_size=12,
)


class Device:
    def __init__(self, quotas: list[int], frequency: bool) -> None:
        self.tables = ResidencyTables(quotas, EXPERTS, CPU)
        self.frequency = frequency
        self.wanted = torch.zeros(EXPERTS + 1, 2, dtype=torch.int32)
        self.slots = torch.zeros(TOP_K, dtype=torch.int32)
        self.pending = torch.zeros(TOP_K, dtype=torch.int32)

    def step(self, layer: int, routed: list[int]) -> list[tuple[int, int]]:
        hidden, staged = torch.zeros(1, 64), torch.zeros(1, 64)
        t = self.tables
        residency_kernel[(2,)](
            torch.tensor(routed), hidden, staged, self.slots, self.pending, self.wanted, self.wanted[-1],
            t.slot_of, t.score, t.unused, t.counters, t.clock, layer, 1, HALF_LIFE,
            num_experts=EXPERTS, num_rows=TOP_K, cols=64, PLANES=3, FREQUENCY=self.frequency, E=8, R=2, BLOCK=64,
        )  # fmt: skip
        return self.listed()

    def prefetch(self, layer: int, likeliest: list[int], predicted: int, limit: int) -> list[tuple[int, int]]:
        logits = torch.empty(1, EXPERTS)
        logits[0, likeliest] = -torch.arange(EXPERTS, dtype=torch.float32)
        t = self.tables
        prefetch_kernel[(1,)](
            logits, self.wanted, self.wanted[-1], t.slot_of, t.score, t.unused, t.counters, t.clock,
            layer, 1, predicted, 0.0, limit, num_experts=EXPERTS, FREQUENCY=self.frequency, E=8,
        )  # fmt: skip
        return self.listed()

    def listed(self) -> list[tuple[int, int]]:
        return [tuple(pair) for pair in self.wanted[: int(self.wanted[-1, 0])].tolist()]


@pytest.mark.parametrize("frequency", [False, True])
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes minutes here
@given(steps=STEPS, quotas=st.sampled_from([[2, 4], [4, 5], [6, 4]]))
def test_same_slots_lists_and_counters_as_the_twin(frequency: bool, steps: list, quotas: list[int]) -> None:  # type: ignore[type-arg]
    policy = DecayedFrequency(HALF_LIFE) if frequency else LRU()
    twin, device = Residency(quotas, EXPERTS, policy), Device(quotas, frequency)
    for now, (first, second, likeliest, predicted, limit) in enumerate(steps, start=1):
        if isinstance(policy, DecayedFrequency):
            policy.now = now
        for layer, routed in ((0, first), (1, second)):
            known = {number for number in routed if number >= 0}
            wanted = [(expert.layer * EXPERTS + expert.expert, slot) for expert, slot in twin.step(layer, known)]
            assert device.step(layer, routed) == wanted
            assert device.pending.tolist() == [int(number in twin.pending) for number in routed]
            if layer == 0:
                ahead = [(e.layer * EXPERTS + e.expert, s) for e, s in twin.prefetch(1, likeliest[:predicted], limit)]
                assert device.prefetch(1, likeliest, predicted, limit) == ahead
        found = {(layer, expert): slot for layer, expert, slot in device.tables.residents()}
        assert found == {(expert.layer, expert.expert): slot for expert, slot in twin.slot_of.items()}
        assert device.tables.counters.tolist() == twin.counters
        twin.check_integrity()
        device.tables.check_integrity()


def test_a_predicted_expert_needs_its_probability() -> None:
    device = Device([2, 2], True)
    sure = torch.full((2, EXPERTS), -20.0)
    sure[0, 5], sure[1, 4] = 20.0, 20.0  # two tokens, each sure of one
    t = device.tables
    prefetch_kernel[(1,)](
        sure, device.wanted, device.wanted[-1], t.slot_of, t.score, t.unused, t.counters, t.clock,
        1, 2, EXPERTS, 0.5, EXPERTS, num_experts=EXPERTS, FREQUENCY=True, E=8,
    )  # fmt: skip
    assert {blob - EXPERTS for blob, _ in device.listed()} == {4, 5}


def test_fetch_copies_what_is_listed_and_nothing_else() -> None:
    blob_bytes, num_bytes = 4096, 2304
    host = torch.randint(0, 256, (5 * blob_bytes,), dtype=torch.uint8)
    pool = torch.zeros(3 * blob_bytes, dtype=torch.uint8)
    wanted = torch.tensor([[4, 0], [1, 2], [3, 1]], dtype=torch.int32)
    fetch_kernel[(3,)](host, pool, wanted, torch.tensor([2], dtype=torch.int32), num_bytes, blob_bytes, BLOCK=256)
    expected = torch.zeros(3, blob_bytes, dtype=torch.uint8)
    for blob, slot in ((4, 0), (1, 2)):
        expected[slot, :num_bytes] = host.view(5, -1)[blob, :num_bytes]
    assert torch.equal(pool.view(3, -1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_routers(dtype: torch.dtype) -> None:
    hidden, weight, logits = torch.randn(3, 80).to(dtype), torch.randn(EXPERTS, 80).to(dtype), torch.zeros(3, EXPERTS)
    logits_kernel[(3, 2)](hidden, weight, logits, cols=80, num_experts=EXPERTS, BE=4, BLOCK=32)
    exact = hidden.double() @ weight.double().T
    twin = (hidden.float() @ weight.float().T).double()
    assert (logits.double() - exact).abs().max() <= 2 * (twin - exact).abs().max() + 1e-6 * exact.abs().max()


def test_quotas() -> None:
    assert layer_quotas(20, 4, 6, 2, 0) == [5, 5, 5, 5]
    assert layer_quotas(14, 4, 6, 2, 1) == [6, 3, 3, 2]
    assert layer_quotas(10, 4, 6, 2, 2) == [3, 3, 2, 2]  # a whole layer would be more than half
    assert layer_quotas(99, 4, 6, 2, 1) == [6, 6, 6, 6]
    with pytest.raises(ValueError, match="7 slots"):
        layer_quotas(7, 4, 6, 2, 1)
