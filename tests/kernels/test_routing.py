"""How experts are chosen: every instruction set gives the twin's bits, and the twin does what families' routers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from fate_moe.kernels.native import DTYPES, native
from fate_moe.kernels.plain_layer import Router
from fate_moe.kernels.routing import SCORES, route
from tests.kernels.test_elementary import of_each_set
from tests.support.bits import numbers
from tests.support.checkpoints import tiny_model


def native_route(router: Router, logits: torch.Tensor, correction: torch.Tensor | None) -> tuple[list[int], torch.Tensor]:
    """Of ``logits`` [experts], by the extension."""
    at, dtype = (correction.data_ptr(), DTYPES[correction.dtype]) if correction is not None else (0, 0)
    of = native.Router.make(
        router.top_k, SCORES.index(router.scores), router.normalize, router.floor, router.scale, at, dtype, router.groups,
        router.top_groups, router.group_best, router.spread, router.rounds_logits, router.rounds_weights,
    )  # fmt: skip
    weights, overwritten = torch.empty(router.top_k), logits.clone()
    return native.route(of, overwritten.data_ptr(), len(logits), weights.data_ptr()), weights


@st.composite
def routers(draw: st.DrawFn) -> Router:
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    size = draw(st.integers(2, 9 if groups > 1 else 70))
    top_groups = draw(st.integers(1, groups))
    options: dict[str, Any] = {
        "scores": draw(st.sampled_from(SCORES)), "group_best": draw(st.sampled_from([1, 2])),
        "floor": draw(st.sampled_from([0.0, 0.3])), "spread": 0.02,
        "rounds_logits": draw(st.booleans()), "rounds_weights": draw(st.booleans()),
        "correction": draw(st.sampled_from([None, "here"])),
    }  # fmt: skip
    top_k = draw(st.integers(1, size * top_groups))
    scale = draw(st.sampled_from([1.0, 2.5]))
    return Router(groups * size, top_k, draw(st.booleans()), scale, groups=groups, top_groups=top_groups, **options)


@pytest.mark.skipif(native is None, reason="the extension is not built")
@given(routers(), st.data())
@example(Router(40, 8, True), None).via("ties go to the lowest index")
def test_every_set_gives_the_twins_bits(router: Router, data: st.DataObject | None) -> None:
    count = router.num_experts
    logits, correction = torch.zeros(count), None
    if data is not None:
        logits = data.draw(numbers(lengths=st.just(count)))
        correction = data.draw(numbers(lengths=st.just(count))).to(data.draw(st.sampled_from(list(DTYPES))))
    correction = correction if router.correction else None
    experts, want = route(router, logits.unsqueeze(0), correction)

    def run() -> torch.Tensor:
        chosen, weights = native_route(router, logits, correction)
        assert chosen == experts[0].tolist()
        return weights

    of_each_set(run, want[0])


def test_the_twin_is_near_fp64() -> None:
    x = 3 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    wide = x.double()
    exact: dict[str, Any] = {"rounds_logits": False, "rounds_weights": False}
    experts, weights = route(Router(1000, 8, True, **exact), x)
    values, index = wide.softmax(-1).topk(8)
    assert torch.equal(experts, index)
    assert (weights - values / values.sum(-1, keepdim=True)).abs().max() < 1e-6
    _, sigmoids = route(Router(1000, 8, False, 2.0, scores="sigmoid", **exact), x)
    assert (sigmoids - 2 * wide.sigmoid().topk(8).values).abs().max() < 1e-6


def test_groups_and_corrections_are_a_familys() -> None:
    config = tiny_model("deepseek_v3", n_routed_experts=24, n_group=4, topk_group=2, num_experts_per_tok=5).config
    own: Any = DeepseekV3TopkRouter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own.weight.normal_(generator=generator)
        own.e_score_correction_bias.normal_(0, 0.2, generator=generator)
        logits, weights, chosen = own(torch.randn(50, 64, generator=generator))
    options: dict[str, Any] = {"rounds_logits": False, "rounds_weights": False, "floor": 1e-20}
    groups: dict[str, Any] = {"scores": "sigmoid", "groups": 4, "top_groups": 2, "group_best": 2}
    router = Router(24, 5, True, own.routed_scaling_factor, correction="here", **groups, **options)
    mine, mine_weights = route(router, logits.detach(), own.e_score_correction_bias)
    by_expert = torch.zeros(2, 50, 24)
    by_expert[0].scatter_(1, chosen, weights.detach())
    by_expert[1].scatter_(1, mine, mine_weights)
    torch.testing.assert_close(by_expert[1], by_expert[0], rtol=1e-5, atol=1e-6)


def test_the_sparse_mixer_is_phimoes() -> None:
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    want, chosen = sparsemixer(logits, jitter_eps=0.2, training=False)
    router = Router(16, 2, False, scores="sparse mixer", spread=0.4, rounds_logits=False, rounds_weights=False)
    mine, weights = route(router, logits)
    assert torch.equal(mine, chosen)
    assert (want < 1).any()
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-6)
