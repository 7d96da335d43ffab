"""One token's routing, residency and look-ahead in one launch, against plain Python over the policies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fate_moe.gpu.tables import ResidencyTables
from fate_moe.kernels.triton_residency import route_kernel
from tests.support.gpu_twin import DecayedFrequency, Residency

pytestmark = pytest.mark.slow

EXPERTS, TOP_K, HALF_LIFE, LIMIT = 6, 2, 4.0, 1
CPU = torch.device("cpu")


@pytest.mark.parametrize("weighed", [False, True])
@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes minutes here
@given(seed=st.integers(0, 2**20), quotas=st.sampled_from([[3, 3], [4, 3], [5, 6]]))
def test_same_choice_slots_and_lists_as_the_twin(weighed: bool, seed: int, quotas: list[int]) -> None:
    random = torch.Generator().manual_seed(seed)
    policy = DecayedFrequency(HALF_LIFE)
    twin = Residency(quotas, EXPERTS, policy)
    tables = ResidencyTables(quotas, EXPERTS, CPU)
    lists = torch.zeros(2, EXPERTS + 1, 2, dtype=torch.int32)
    slots, pending, weights = torch.zeros(TOP_K, dtype=torch.int32), torch.zeros(TOP_K, dtype=torch.int32), torch.zeros(1, TOP_K)
    one = torch.ones(1, dtype=torch.int32)
    for now in range(1, 9):
        policy.now = now
        for layer in (0, 1):
            logits, ahead = 2 * torch.randn(2, EXPERTS, generator=random)
            looks = layer == 0 and quotas[1] < EXPERTS
            route_kernel[(1 + looks,)](
                logits, ahead, slots, weights, one, weights, slots, pending, lists[0], lists[0, -1], lists[1], lists[1, -1],
                tables.slot_of, tables.score, tables.unused, tables.counters, tables.clock, layer, 1, EXPERTS, EXPERTS,
                HALF_LIFE, TOP_K, 0.0, LIMIT, lists[1], lists[1], lists[1], lists[1], 0, 0, logits, logits, logits, 1.0, 0.0, 0.0,
                num_experts=EXPERTS, top_k=TOP_K, cols=EXPERTS, TOKENS=1, SCORES="softmax", CORRECTED=False,
                GROUPS=1, TOP_GROUPS=1, GROUP_BEST=1, NORMALIZE=False, ROUNDS=True,
                SIGMOID_NEXT=False, FREQUENCY=True, WEIGHED=weighed, HOST=False, ADMITS=False, MOST=0, E=8, R=2,
            )  # fmt: skip
            probabilities = logits.softmax(0)
            best = probabilities.topk(TOP_K)
            torch.testing.assert_close(weights[0], best.values)
            if weighed:
                policy.weigh(layer, probabilities.sqrt().tolist())
            wanted = twin.step(layer, set(best.indices.tolist()), touch=not weighed)
            assert lists[0, : int(lists[0, -1, 0])].tolist() == [[e.layer * EXPERTS + e.expert, slot] for e, slot in wanted]
            if looks:
                fetched = twin.prefetch(1, ahead.topk(TOP_K).indices.tolist(), LIMIT)
                assert lists[1, : int(lists[1, -1, 0])].tolist() == [[EXPERTS + e.expert, slot] for e, slot in fetched]
        assert {(layer, e): s for layer, e, s in tables.residents()} == {(e.layer, e.expert): s for e, s in twin.slot_of.items()}
        assert tables.counters.tolist() == twin.counters
        tables.check_integrity()
