from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.core import Router, Routing
from fate_moe.errors import ConfigError
from fate_moe.predict.activation_path import ActivationPath
from fate_moe.predict.cross_layer import CrossLayerRouter
from fate_moe.predict.forecast import Forecast, forecast_source
from fate_moe.predict.gates import FittedGates, LinearRouters, RouterScorer
from fate_moe.predict.predictors import Known
from fate_moe.predict.recursive import RecursiveRouters
from fate_moe.predict.temporal import Temporal
from fate_moe.registry import PREDICTORS, make_predictor
from fate_moe.runtime import rows_by_expert
from tests.support.predictor_contract import check_predictor

NUM_LAYERS, NUM_EXPERTS, HIDDEN, TOP_K = 3, 16, 8, 2


def linear_router(seed: int) -> Router:
    weight = torch.randn(NUM_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed))

    def route(hidden: torch.Tensor) -> Routing:
        scores = hidden @ weight.T
        return Routing(scores.topk(TOP_K, dim=-1).indices, scores)

    return route


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("seed", range(3))
def test_contract(name: str, seed: int) -> None:
    routers: list[Router | None] = [linear_router(0), linear_router(1), None]
    generator = torch.Generator().manual_seed(seed)
    gates = [torch.randn(NUM_EXPERTS, HIDDEN + 1, generator=generator) for _ in range(NUM_LAYERS)]
    weights = [torch.randn(NUM_EXPERTS, HIDDEN, generator=generator) for _ in range(NUM_LAYERS)]
    forecast = [torch.randn(NUM_EXPERTS, 2 * HIDDEN + 1, generator=generator) for _ in range(NUM_LAYERS)]
    norms = torch.rand(NUM_LAYERS, HIDDEN, generator=generator)
    known = Known(routers, weights, norms, FittedGates(gates, [None, *gates[1:]]), forecast)
    check_predictor(make_predictor(name, [NUM_EXPERTS] * NUM_LAYERS, TOP_K, known, 2), NUM_LAYERS, NUM_EXPERTS, HIDDEN)


def test_names() -> None:
    with pytest.raises(ConfigError, match="fate fit"):
        make_predictor("forecast", [4], 2, Known([None]))
    with pytest.raises(ConfigError, match="linear routers behind RMS norms"):
        make_predictor("cross-layer-norm", [4], 2, Known([None]))
    with pytest.raises(ConfigError, match="'oracle'"):
        make_predictor("oracle", [4], 2, Known([None]))
    combined = make_predictor("combined", [4], 2, Known([None]))
    assert combined.predict(0, torch.zeros(3, HIDDEN)) == [], "without fitted gates there is no prediction for layer 0 of a prompt"


def test_activation_path_predicts_the_experts_of_the_most_similar_sequence() -> None:
    predictor = ActivationPath([8, 8])
    one, many = torch.zeros(1, HIDDEN), torch.zeros(5, HIDDEN)
    for first, second in (([0, 1], [2, 3]), ([4, 5], [6, 7])):
        predictor.predict(0, many)  # a prompt: another sequence begins
        for _ in range(3):
            predictor.observe(0, first)
            predictor.observe(1, second)
    predictor.predict(0, many)
    predictor.observe(0, [0, 1])
    predictor.observe(1, [2, 4])
    assert [expert for expert, _ in predictor.predict(1, one)] == [2, 3]


def test_temporal_predicts_what_follows() -> None:
    predictor = Temporal([6])
    for _ in range(40):  # 0 and 1 take turns with 2 and 3
        predictor.observe(0, [0, 1])
        predictor.observe(0, [2, 3])
    assert {expert for expert, _ in predictor.predict(0, torch.zeros(1, HIDDEN))[:2]} == {0, 1}


def test_learned_probabilities_are_frequencies() -> None:
    """The next layer's router on a noisy router input: a fraction p of those predicted with p is chosen, in the router's order."""
    generator = torch.Generator().manual_seed(5)
    route = linear_router(1)
    predictor = make_predictor("cross-layer-probability", [NUM_EXPERTS] * 2, TOP_K, Known([None, route]))
    probabilities, hits = [], []
    for step in range(1500):
        truth = torch.randn(1, HIDDEN, generator=generator)
        seen = truth + 0.7 * torch.randn(1, HIDDEN, generator=generator)
        predicted = predictor.predict(1, seen)
        ranked = route(seen).scores[0].argsort(descending=True).tolist()
        assert [expert for expert, _ in predicted] == ranked[: len(predicted)]
        chosen = route(truth).experts[0].tolist()
        if step >= 500:
            probabilities += [probability for _, probability in predicted]
            hits += [expert in chosen for expert, _ in predicted]
        predictor.observe(1, chosen)
    predicted_array, hit_array = np.array(probabilities), np.array(hits)
    for low, high in ((0.05, 0.2), (0.2, 0.5), (0.5, 1.01)):
        among = (predicted_array >= low) & (predicted_array < high)
        assert among.sum() > 100
        error = 3 * (0.25 / among.sum()) ** 0.5  # three standard errors of a frequency
        assert abs(predicted_array[among].mean() - hit_array[among].mean()) < error + 0.02


def test_fitted_gates_are_affine() -> None:
    weight = torch.randn(5, HIDDEN + 1, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(2))
    scores = FittedGates([weight]).scores(0, x)
    assert scores is not None
    assert torch.allclose(scores, x @ weight[:, :-1].T + weight[:, -1], atol=1e-6)


def test_a_router_may_return_half_precision() -> None:
    def route(hidden: torch.Tensor) -> Routing:
        routing = linear_router(1)(hidden)
        return Routing(routing.experts, routing.scores.bfloat16())

    for name in ("cross-layer", "cross-layer-probability", "combined", "recursive"):
        predictor = make_predictor(name, [NUM_EXPERTS] * 2, TOP_K, Known([None, route]))
        for num_tokens in (1, 3):
            assert predictor.predict(1, torch.ones(num_tokens, HIDDEN))


def test_routers_get_the_residual_stream_through_their_own_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(NUM_EXPERTS, HIDDEN, generator=generator) for _ in range(3)]
    norms, stream = torch.rand(3, HIDDEN, generator=generator) + 0.1, torch.randn(1, HIDDEN, generator=generator)
    scorer = LinearRouters(weights, norms)
    for source, layer in ((0, 1), (0, 2), (1, 2)):
        expected = (stream * norms[layer]) @ weights[layer].T
        scores = scorer.scores(layer, stream * norms[source], layer - source)
        assert scores is not None
        assert torch.allclose(scores, expected, atol=1e-4)
        matrix = scorer.matrix(layer, layer - source)
        assert torch.allclose((stream * norms[source]) @ matrix[:, :-1].T + matrix[:, -1], expected, atol=1e-4)
    assert scorer.scores(0, stream) is None, "layer 0 has no predecessor"


def test_a_forecast_uses_the_embedding_and_the_previous_tokens_router_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(NUM_EXPERTS, 2 * HIDDEN + 1, generator=generator) for _ in range(3)]
    forecast, tokens = Forecast(weights), torch.randn(3, 4, 1, HIDDEN, generator=generator)  # token, router input (embedding first)
    for number, token in enumerate(tokens):
        for layer in range(3):
            got = forecast.scores(layer, token[layer], 1)
            if number == 0:
                assert got is None, "there is no previous token"
                continue
            source = 1 + forecast_source(layer, 3)
            x = torch.cat([token[0], tokens[number - 1][source], torch.ones(1, 1)], 1)
            assert got is not None
            assert torch.allclose(got, x @ weights[layer].T, atol=1e-4)


def test_recursive_routers_learn_to_correct_the_routers() -> None:
    """The true choice is the routers' with permuted experts: recall is low at first and high after learning."""
    generator = torch.Generator().manual_seed(0)
    rename = torch.randperm(NUM_EXPERTS, generator=generator)
    scorer = RecursiveRouters(RouterScorer([None, linear_router(1)]), [NUM_EXPERTS] * 2)
    recalls = []
    for _ in range(6000):
        x = torch.randn(1, HIDDEN, generator=generator)
        truth = linear_router(1)(x).scores[0][rename].topk(TOP_K).indices.tolist()
        scores = scorer.scores(1, x)
        assert scores is not None
        recalls.append(len(set(scores[0].topk(TOP_K).indices.tolist()) & set(truth)) / TOP_K)
        scorer.observe(1, truth)
    assert sum(recalls[:100]) / 100 < 0.4
    assert sum(recalls[-500:]) / 500 > 0.7


def test_cross_layer_is_the_next_router_on_this_router_input() -> None:
    routers: list[Router | None] = [linear_router(0), linear_router(1), None]
    predictor = CrossLayerRouter(routers)
    router_input = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(9))
    predicted = predictor.predict(1, router_input)
    routing = linear_router(1)(router_input)
    assert [expert for expert, _ in predicted[:TOP_K]] == routing.experts[0].tolist()
    quarter = routing.scores[0].argsort(descending=True)[: NUM_EXPERTS // 4].tolist()
    assert [expert for expert, _ in predicted] == quarter, "top-k, widened to the most confident quarter"
    expected = routing.scores[0].softmax(-1)
    assert all(abs(probability - float(expected[expert])) < 1e-6 for expert, probability in predicted)
    assert predictor.predict(0, router_input) == [], "layer 0 has no predecessor"
    assert predictor.predict(2, router_input) == [], "a router that cannot be called early predicts nothing"


def test_a_prompt_gets_every_tokens_choice_most_votes_first() -> None:
    router_input = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(4))
    routers: list[Router | None] = [None, linear_router(1)]
    predicted = [expert for expert, _ in CrossLayerRouter(routers).predict(1, router_input)]
    votes = torch.bincount(linear_router(1)(router_input).experts.flatten(), minlength=NUM_EXPERTS)
    assert set(votes.nonzero().flatten().tolist()) <= set(predicted)
    assert [int(votes[expert]) for expert in predicted] == sorted(votes[predicted].tolist(), reverse=True)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))
def test_rows_by_expert(num_tokens: int, top_k: int, num_experts: int, seed: int) -> None:
    """Every valid choice belongs to its expert exactly once, most chosen first; masked choices (num_experts, -1) to none."""
    index = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed))
    rows = rows_by_expert(index, num_experts)
    flat = index.flatten().tolist()
    assert sorted(row for chosen in rows.values() for row in chosen) == [
        row for row, expert in enumerate(flat) if 0 <= expert < num_experts
    ]
    assert all(flat[row] == expert for expert, chosen in rows.items() for row in chosen)
    counts = [len(chosen) for chosen in rows.values()]
    assert counts == sorted(counts, reverse=True)
