"""Predictors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fate_moe.core import Predictor, Routing
from fate_moe.errors import ConfigError
from fate_moe.memory.statistics import RoutingStatistics
from fate_moe.predict.activation_path import ActivationPath
from fate_moe.predict.cross_layer import CrossLayerRouter
from fate_moe.predict.forecast import Forecast
from fate_moe.predict.gates import FittedGates, LinearRouters, RouterScorer, Scorer, Scorers
from fate_moe.predict.null import NoPrediction
from fate_moe.predict.probability import ExpectedUses, ProbabilityPredictor
from fate_moe.predict.recursive import RecursiveRouters
from fate_moe.predict.temporal import Temporal

__all__ = ["Known", "make_predictor"]


@dataclass(frozen=True)
class Known:
    """What there is to predict from: routers that can be asked and, where they are linear, their weights [E, D] and the gains
    [L, D] of the norms before them; gates fitted by `fate fit`; and the expected uses that a policy keeps anyway."""

    routers: Sequence[Callable[[torch.Tensor], Routing] | None]
    linear: Sequence[torch.Tensor] | None = None
    norms: torch.Tensor | None = None
    fitted: FittedGates | None = None
    forecast: Sequence[torch.Tensor] | None = None
    history: ExpectedUses | None = None


def make_predictor(name: str, experts_per_layer: Sequence[int], top_k: int, known: Known, look_ahead: int = 1) -> Predictor:
    """The predictor called ``name`` (config.PREDICTORS) for up to ``look_ahead`` layers.

    Raises ConfigError for a name that does not exist, and for one that needs what is not known.
    """
    sizes = list(experts_per_layer)
    if name == "none":
        return NoPrediction()
    if name == "temporal":
        return Temporal(sizes)
    if name == "activation-path":
        return ActivationPath(sizes)
    if name == "cross-layer":
        return CrossLayerRouter(known.routers)
    if name == "cross-layer-probability":
        return ProbabilityPredictor(RouterScorer(known.routers), sizes, top_k, look_ahead=look_ahead)
    if name == "cross-layer-norm":
        if known.linear is None or known.norms is None:
            raise ConfigError(f"predictor {name!r} needs linear routers behind RMS norms; take cross-layer-probability")
        return ProbabilityPredictor(LinearRouters(known.linear, known.norms), sizes, top_k, look_ahead=look_ahead)
    if name == "recursive" or (name == "learned" and known.fitted is None):
        return ProbabilityPredictor(RecursiveRouters(_best_routers(known), sizes), sizes, top_k, look_ahead=look_ahead)
    if name == "learned" and known.fitted is not None:
        return ProbabilityPredictor(known.fitted, sizes, top_k, look_ahead=look_ahead)
    if name == "forecast":
        if known.forecast is None:
            raise ConfigError("predictor 'forecast' needs what is fitted by: fate fit MODEL --text FILE --forecast")
        return ProbabilityPredictor(Forecast(known.forecast), sizes, top_k, look_ahead=look_ahead)
    if name == "combined":
        routers = _best_routers(known)
        scorer = routers if known.fitted is None else Scorers(known.fitted, routers)
        forecast = None if known.forecast is None else Forecast(known.forecast)
        history, own = (
            (known.history, None)
            if known.history is not None
            else (statistics := RoutingStatistics(sizes, co_activation=False), statistics)
        )
        gate = ProbabilityPredictor(scorer, sizes, top_k, look_ahead=look_ahead, history=history, forecast=forecast)
        return gate if own is None else _Counting(gate, own, top_k)
    raise ConfigError(f"predictor {name!r} does not exist")


def _best_routers(known: Known) -> Scorer:
    """The routers on the residual stream where they are linear: better by a point or two, and one product instead of a module."""
    return RouterScorer(known.routers) if known.linear is None else LinearRouters(known.linear, known.norms)


class _Counting:
    """A predictor whose history nobody else keeps."""

    gives_probabilities = True

    def __init__(self, gate: ProbabilityPredictor, statistics: RoutingStatistics, top_k: int) -> None:
        self._gate, self._statistics, self._top_k = gate, statistics, top_k
        self.predict = gate.predict

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        self._gate.observe(layer, routed)
        if len(routed) <= self._top_k:
            self._statistics.routed(layer, routed)
