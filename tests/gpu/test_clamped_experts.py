"""gpt_oss' experts: rows of gate and up in turns, biases, a clamped gate; by the device's kernels and by the host's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from fate_moe.errors import UnsupportedModelError
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.host_trial import make_trial
from fate_moe.gpu.options import DeviceOptions
from fate_moe.kernels.native import native
from tests.support.device import CPU, Model, random_model, route, twin

pytestmark = pytest.mark.slow

GATE: dict[str, Any] = {"mixed": True, "alpha": 1.702, "limit": 0.75, "up_offset": 1.0}


def clamped(precision: str = "int4", width: int = 72) -> Model:
    module = GptOssExperts(GptOssConfig(num_local_experts=1, hidden_size=8, intermediate_size=8))
    module.limit = GATE["limit"]  # which random numbers pass often
    module.has_gate = True
    return random_model(precision, torch.bfloat16, experts=4, top_k=2, hidden=128, width=width, module=module)


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("tokens", [1, 20])  # decode, a prompt
def test_the_twins_bits(precision: str, tokens: int) -> None:
    model = clamped(precision)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    index, weights = route(model, 0, x)
    out = model.experts(3, DeviceOptions(limit=0)).compute(0, x, index, weights)
    assert torch.equal(out, twin(model, 0, x, index, weights, **GATE))
    assert not torch.equal(out, twin(model, 0, x, index, weights, **{**GATE, "limit": 1e9})), "nothing was clamped"


def test_unquantized_ones_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="those of precision int4 and int8 have"):
        clamped("lossless").experts(3)


@pytest.mark.skipif(native is None, reason="the C++ kernels are not built")
def test_the_hosts_bits() -> None:
    model = clamped()
    host = HostCompute(model.layout, model.shapes, model.module, model.arena, model.top_k, CPU, threads=2)
    experts = model.experts(3, DeviceOptions(limit=0, host_compute=1.0), host_compute=host)
    misses, hosted, layers = make_trial(experts, host)
    for each in (misses, hosted):
        each.fill_(2)
    layers(1)
    x, one = torch.ones(1, 128), torch.ones(1, 1)
    for place, expert in enumerate((0, 13 % 4)):
        assert torch.equal(host.outside[place : place + 1], twin(model, 0, x, torch.tensor([[expert]]), one, **GATE))
    host.close()
