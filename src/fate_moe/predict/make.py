"""Predictors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fate_moe.core import Predictor, Routing
from fate_moe.errors import ConfigError
from fate_moe.predict.activation_path import ActivationPath
from fate_moe.predict.cross_layer import CrossLayerGate
from fate_moe.predict.gates import CalibratedGate, FittedGates, cloned_gate, fitted_gate
from fate_moe.predict.null import NoPrediction
from fate_moe.predict.temporal import Temporal

__all__ = ["make_predictor"]


def make_predictor(
    name: str,
    experts_per_layer: Sequence[int],
    routers: Sequence[Callable[[torch.Tensor], Routing] | None],
    top_k: int,
    fitted: FittedGates | None = None,
) -> Predictor:
    """The predictor called ``name`` (config.PREDICTORS); ``fitted`` gates are used where it can and they are there.

    Raises ConfigError for a name that does not exist, and for "learned" without fitted gates.
    """
    if name == "none":
        return NoPrediction()
    if name == "temporal":
        return Temporal(experts_per_layer)
    if name == "activation-path":
        return ActivationPath(experts_per_layer)
    if name == "cross-layer":
        return CrossLayerGate(routers)
    if name == "cross-layer-calibrated":
        return CalibratedGate(cloned_gate(routers), experts_per_layer, top_k)
    if name == "learned":
        if fitted is None:
            raise ConfigError("predictor 'learned' needs gates fitted to this model; make them with: fate fit MODEL --text FILE")
        return CalibratedGate(fitted_gate(fitted), experts_per_layer, top_k)
    if name == "combined":
        scorer = cloned_gate(routers) if fitted is None else fitted_gate(fitted)
        return CalibratedGate(scorer, experts_per_layer, top_k, history=True)
    raise ConfigError(f"predictor {name!r} does not exist")
