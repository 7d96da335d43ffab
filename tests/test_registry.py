"""Names of policies, predictors and presets: listed without torch, made lazily, open to others'."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fate_moe.cli.options import add_offload_options
from fate_moe.config import OffloadConfig
from fate_moe.core import EvictionPolicy, Predictor
from fate_moe.errors import ConfigError
from fate_moe.gpu.options import DeviceOptions
from fate_moe.memory.policies import LRU
from fate_moe.predict.null import NoPrediction
from fate_moe.predict.predictors import Known
from fate_moe.registry import (
    POLICIES,
    PREDICTORS,
    PRESETS,
    Preset,
    make_policy,
    make_predictor,
    register_policy,
    register_predictor,
    register_preset,
)


class Mine(LRU):
    def __init__(self, num_slots: int, experts_per_layer: Sequence[int]) -> None:
        super().__init__()
        self.given = (num_slots, list(experts_per_layer))


def route_nothing(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    return NoPrediction()


@pytest.fixture
def registered() -> Iterator[None]:
    """A policy, a predictor and a preset called "mine", forgotten when the test ends."""
    register_policy("mine", Mine, "what I do")
    register_predictor("mine", route_nothing, "what I foresee")
    register_preset("mine", Preset("what I like", "mine", "mine", DeviceOptions(limit=0)))
    yield
    for entries in (POLICIES, PREDICTORS, PRESETS):
        del entries["mine"]


def test_listing_and_checking_need_no_torch() -> None:
    code = (
        "import sys; from fate_moe.config import OffloadConfig; from fate_moe.registry import *;"
        "OffloadConfig(policy='lru'); [print(name, of.summary) for name, of in (POLICIES | PREDICTORS | PRESETS).items()];"
        "make_policy('lru', 2, [4]); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    built_in = [entry for entries in (POLICIES, PREDICTORS, PRESETS) for entry in entries.values() if entry.built_in]
    assert len(done.stdout.splitlines()) == len(built_in)


def test_every_entry_can_be_made_and_says_what_it_is() -> None:
    linear = [torch.ones(4, 8), torch.ones(4, 8)]
    known = Known([None, None], linear=linear, norms=torch.ones(2, 8), forecast=[torch.ones(4, 17), torch.ones(4, 17)])
    for name, entry in POLICIES.items():
        assert entry.summary or not entry.built_in
        assert callable(make_policy(name, 2, [4, 4]).victim)
    for name, entry in PREDICTORS.items():
        assert entry.summary or not entry.built_in
        assert callable(make_predictor(name, [4, 4], 2, known).predict)
    for preset in PRESETS.values():
        assert preset.summary
        assert preset.policy in POLICIES
        assert preset.predictor in PREDICTORS


def test_presets_mean_something_on_each_device() -> None:
    assert (PRESETS["best"].policy, PRESETS["best"].predictor) == ("co-activation", "combined")
    assert OffloadConfig(preset="load-on-demand").policy_name == "lru"
    assert OffloadConfig(preset="load-on-demand", policy="lfu").policy_name == "lfu"
    devices = [preset.device for preset in PRESETS.values() if preset.keeps_experts]
    assert len({repr(device) for device in devices}) == len(devices)
    assert PRESETS["load-on-demand"].device.limit == 0
    assert PRESETS["eap"].device.activation_path


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: make_policy("lur", 2, [4]), "policy 'lur'"),
        (lambda: make_predictor("nnoe", [4], 2, Known([None])), "predictor 'nnoe'"),
        (lambda: OffloadConfig(preset="bets"), "preset 'bets'"),
        (lambda: OffloadConfig(policy="lur"), "policy 'lur'"),
        (lambda: OffloadConfig(predictor="nnoe"), "predictor 'nnoe'"),
    ],
)
def test_unknown_names_name_the_nearest(make: Callable[[], object], kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind} is not one of .*did you mean"):
        make()


def test_your_own(registered: None) -> None:
    config = OffloadConfig(preset="mine")
    assert (config.policy_name, config.predictor_name) == ("mine", "mine")
    policy: EvictionPolicy = make_policy("mine", 3, [4, 5])
    assert isinstance(policy, Mine)
    assert policy.given == (3, [4, 5])
    assert isinstance(make_predictor("mine", [4], 2, Known([None])), NoPrediction)
    parser = argparse.ArgumentParser()
    add_offload_options(parser)
    assert parser.parse_args(["--policy", "mine", "--preset", "mine"]).policy == "mine"
    assert "mine: what I do" in " ".join(parser.format_help().split())
    register_policy("mine", Mine, "what I do now")  # a notebook's cell, run again
    assert POLICIES["mine"].summary == "what I do now"


def test_your_own_runs(registered: None, loaded: Callable[..., Any]) -> None:
    loaded("qwen2_moe", policy="mine", predictor="mine", expert_cache="50%")


def test_the_papers_load_on_demand_keeps_nothing_between_tokens(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe", precision="int4", preset="lod-paper")
    assert model.fate.plan.num_slots == model.config.num_experts_per_tok
    before = model.fate.report().experts
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
    experts = model.fate.report().experts
    assert (experts.hits - before.hits, experts.in_flight - before.in_flight) == (0, 0)
    assert experts.misses - before.misses >= 5 * model.config.num_hidden_layers * model.config.num_experts_per_tok


@pytest.mark.parametrize("beside", [{"expert_cache": "25%"}, {"device": "cuda"}])
def test_the_papers_load_on_demand_refuses_what_it_cannot_mean(beside: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="preset lod-paper"):
        OffloadConfig(preset="lod-paper", **beside)


def test_names_of_the_package_stay() -> None:
    with pytest.raises(ConfigError, match="comes with the package"):
        register_policy("lru", Mine)
    with pytest.raises(ConfigError, match="comes with the package"):
        register_predictor("none", route_nothing)
    with pytest.raises(ConfigError, match="comes with the package"):
        register_preset("best", Preset("", "lru", "none"))
    with pytest.raises(ConfigError, match="policy 'gone'"):
        register_preset("new", Preset("", "gone", "none"))
