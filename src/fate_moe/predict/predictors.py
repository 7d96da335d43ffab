"""What registry.py makes by name, and what predictors are made from."""

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

__all__ = ["Counting", "Known"]


@dataclass(frozen=True)
class Known:
    """What there is to predict from: routers that can be asked and, where they are linear, their weights [E, D] and the gains
    [L, D] of the norms before them; gates fitted by `fate fit`; and the expected uses that a policy counts in any case."""

    routers: Sequence[Callable[[torch.Tensor], Routing] | None]
    linear: Sequence[torch.Tensor] | None = None
    norms: torch.Tensor | None = None
    fitted: FittedGates | None = None
    forecast: Sequence[torch.Tensor] | None = None
    history: ExpectedUses | None = None


# What the registry makes: (experts_per_layer, top_k, known, look_ahead) -> predictor.


def none(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    return NoPrediction()


def temporal(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    return Temporal(sizes)


def activation_path(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    return ActivationPath(sizes)


def cross_layer(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    return CrossLayerRouter(known.routers)


def cross_layer_probability(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    return ProbabilityPredictor(RouterScorer(known.routers), sizes, top_k, look_ahead=look_ahead)


def cross_layer_norm(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    if known.linear is None or known.norms is None:
        raise ConfigError("predictor 'cross-layer-norm' needs linear routers behind RMS norms; choose cross-layer-probability")
    return ProbabilityPredictor(LinearRouters(known.linear, known.norms), sizes, top_k, look_ahead=look_ahead)


def recursive(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    return ProbabilityPredictor(RecursiveRouters(_best_routers(known), sizes), sizes, top_k, look_ahead=look_ahead)


def learned(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    if known.fitted is None:
        return recursive(sizes, top_k, known, look_ahead)
    return ProbabilityPredictor(known.fitted, sizes, top_k, look_ahead=look_ahead)


def forecast(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    if known.forecast is None:
        raise ConfigError("predictor 'forecast' needs what is fitted by: fate fit MODEL --text FILE --forecast")
    return ProbabilityPredictor(Forecast(known.forecast), sizes, top_k, look_ahead=look_ahead)


def combined(sizes: Sequence[int], top_k: int, known: Known, look_ahead: int) -> Predictor:
    routers = _best_routers(known)
    scorer = routers if known.fitted is None else Scorers(known.fitted, routers)
    whole_token = None if known.forecast is None else Forecast(known.forecast)
    own = RoutingStatistics(sizes, co_activation=False) if known.history is None else None
    history = known.history if own is None else own
    predictor = ProbabilityPredictor(scorer, sizes, top_k, look_ahead=look_ahead, history=history, forecast=whole_token)
    return predictor if own is None else Counting(predictor, own, top_k)


def _best_routers(known: Known) -> Scorer:
    """The routers on the residual stream where they are linear: better by a point or two, and one product instead of a module."""
    return RouterScorer(known.routers) if known.linear is None else LinearRouters(known.linear, known.norms)


class Counting:
    """A predictor with statistics of its own, where the policy has none."""

    gives_probabilities = True

    def __init__(self, predictor: ProbabilityPredictor, statistics: RoutingStatistics, top_k: int) -> None:
        self.predictor, self._statistics, self.top_k = predictor, statistics, top_k
        self.predict = predictor.predict

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        self.predictor.observe(layer, routed)
        if len(routed) <= self.top_k:
            self._statistics.routed(layer, routed)
