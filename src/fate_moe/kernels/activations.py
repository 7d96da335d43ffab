"""Which of the extension's activations a family's experts have: found by trying, so that no list of families is needed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from fate_moe.kernels.modes import neutral
from fate_moe.kernels.native import native

__all__ = ["find_activation"]

_ACTIVATIONS = range(5)  # silu, gelu, gelu (tanh), relu, relu squared: csrc/ops.h
_NUM_PROBES = 96


@neutral()
@torch.no_grad()  # within: neutral() would end it
def find_activation(experts: Any) -> Any:
    """The extension's Gate that does what ``experts._apply_gate`` (or ``act_fn``, without a gate) does; None if there is none.

    ``experts`` is the transformers module. Limits and slopes are taken from its attributes.
    """
    if getattr(experts, "has_post_expert_norm", False):
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 2 * _NUM_PROBES, generator=generator, dtype=torch.float32) * 6  # beyond the families' limits (7) too
    try:
        want = experts._apply_gate(probe) if experts.has_gate else experts.act_fn(probe)
    except (RuntimeError, TypeError, AttributeError):
        return None
    alphas = {1.0, *_numbers(experts, "alpha", "swiglu_alpha")}
    limits = {math.inf, *_numbers(experts, "limit", "swiglu_limit")}
    interleaved = (False, True) if experts.has_gate else (False,)
    got = torch.empty_like(want)
    for choice in itertools.product(_ACTIVATIONS, interleaved, sorted(alphas), sorted(limits), (0.0, 1.0)):
        activation, mixed, alpha, limit, offset = choice
        gate = native.ActivationSpec.make(activation, bool(experts.has_gate), mixed, alpha, limit, offset)
        native.activate(gate, probe.data_ptr(), want.shape[1], got.data_ptr())
        if (got - want).abs().max() <= 1e-6 * want.abs().max():  # to tell formulas apart, not to judge their accuracy
            return gate
    return None


def _numbers(experts: Any, *names: str) -> list[float]:
    values = (getattr(experts, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, int | float)]
