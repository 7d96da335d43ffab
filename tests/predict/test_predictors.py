from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.core import Routing
from fate_moe.predict.cross_layer import CrossLayerGate
from fate_moe.predict.null import NoPrediction
from fate_moe.runtime import Router, rows_by_expert
from tests.predict.contract import check_predictor

NUM_LAYERS, NUM_EXPERTS, HIDDEN, TOP_K = 3, 16, 8, 2


def linear_router(seed: int) -> Router:
    weight = torch.randn(NUM_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed))

    def route(hidden: torch.Tensor) -> Routing:
        scores = hidden @ weight.T
        return Routing(scores.topk(TOP_K, dim=-1).indices, scores)

    return route


def test_contract() -> None:
    routers: list[Router | None] = [linear_router(0), linear_router(1), None]
    check_predictor(NoPrediction(), NUM_LAYERS, NUM_EXPERTS, HIDDEN)
    check_predictor(CrossLayerGate(routers), NUM_LAYERS, NUM_EXPERTS, HIDDEN)


def test_cross_layer_is_the_next_router_on_this_gate_input() -> None:
    routers: list[Router | None] = [linear_router(0), linear_router(1), None]
    predictor = CrossLayerGate(routers)
    gate_input = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(9))
    predicted = predictor.predict(1, gate_input)
    routing = linear_router(1)(gate_input)
    assert [expert for expert, _ in predicted[:TOP_K]] == routing.experts[0].tolist()
    quarter = routing.scores[0].argsort(descending=True)[: NUM_EXPERTS // 4].tolist()
    assert [expert for expert, _ in predicted] == quarter, "top-k, widened to the most confident quarter"
    expected = routing.scores[0].softmax(-1)
    assert all(abs(probability - float(expected[expert])) < 1e-6 for expert, probability in predicted)
    assert predictor.predict(0, gate_input) == [], "layer 0 has no predecessor"
    assert predictor.predict(2, gate_input) == [], "a router that cannot be asked early predicts nothing"


def test_prefill_covers_every_tokens_choice_most_votes_first() -> None:
    gate_input = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(4))
    routers: list[Router | None] = [None, linear_router(1)]
    predicted = [expert for expert, _ in CrossLayerGate(routers).predict(1, gate_input)]
    votes = torch.bincount(linear_router(1)(gate_input).experts.flatten(), minlength=NUM_EXPERTS)
    assert set(votes.nonzero().flatten().tolist()) <= set(predicted)
    assert [int(votes[expert]) for expert in predicted] == sorted(votes[predicted].tolist(), reverse=True)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))
def test_rows_by_expert(num_tokens: int, top_k: int, num_experts: int, seed: int) -> None:
    """Every valid choice belongs to its expert exactly once, most chosen first; masked choices (num_experts, -1) to nobody."""
    index = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed))
    rows = rows_by_expert(index, num_experts)
    flat = index.flatten().tolist()
    assert sorted(row for chosen in rows.values() for row in chosen.tolist()) == [
        row for row, expert in enumerate(flat) if 0 <= expert < num_experts
    ]
    assert all(flat[row] == expert for expert, chosen in rows.items() for row in chosen.tolist())
    counts = [len(chosen) for chosen in rows.values()]
    assert counts == sorted(counts, reverse=True)
