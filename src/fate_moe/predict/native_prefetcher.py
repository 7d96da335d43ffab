"""The prefetcher in C++ (csrc/prefetcher.h), for predictors that are linear maps, a history and learned probabilities: a step looks
ahead by it without Python between layers. Whether a pass looks ahead is decided here, as by its twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fate_moe.core import Predictor
from fate_moe.kernels.native import BF16, DTYPES, native
from fate_moe.predict import blend, probability, reliability
from fate_moe.predict.gates import LinearMap
from fate_moe.predict.predictors import Counting
from fate_moe.predict.prefetcher import MAX_MISSING, PROTECTED_FROM, Prefetcher
from fate_moe.predict.probability import ProbabilityPredictor
from fate_moe.predict.rule import WASTE

__all__ = ["NativePrefetcher", "make_prefetcher", "native_chances"]


def make_prefetcher(residency: Any, predictor: Predictor, num_layers: int, look_ahead: int) -> Prefetcher:
    """In C++ where the extension has ``residency`` and all that ``predictor`` is made of."""
    memory = getattr(residency, "native", None)
    chances = native_chances(predictor) if memory is not None else None
    if chances is None:
        return Prefetcher(residency, predictor, num_layers, look_ahead=look_ahead)
    return NativePrefetcher(residency, predictor, num_layers, look_ahead, chances)


def native_chances(predictor: Predictor) -> Any:
    """The extension's twin of ``predictor`` as it is new; None if it has none."""
    counts, parts = 0, getattr(predictor, "predictor", predictor)
    if type(predictor) is Counting:
        counts = predictor.top_k
    elif type(predictor) is not ProbabilityPredictor:
        return None
    assert isinstance(parts, ProbabilityPredictor)
    statistics = getattr(parts.history, "native", None)
    if native is None or parts.forecast is not None or (parts.history is not None and statistics is None):
        return None
    maps = [[parts.scorer.map(layer, ahead) for layer in range(len(parts.sizes))] for ahead in range(1, parts.look_ahead + 1)]
    if any(one is not None and not isinstance(one, LinearMap) for by_layer in maps for one in by_layer):
        return None
    new = reliability.ScoreProbabilities(1, max(parts.sizes))
    start = [1.0, *([probability.HISTORY] if parts.history is not None else [])]
    return native.Chances.make(
        sizes=parts.sizes,
        top_k=parts.top_k,
        look_ahead=parts.look_ahead,
        least=probability.MIN_PROBABILITY,
        prior=new.rates[0].tolist(),
        range=(reliability.LOW, reliability.HIGH),
        strength=reliability.PRIOR_STRENGTH,
        learn_every=reliability.LEARN_EVERY,
        weights=start,
        curvature=blend.PRIOR,
        slope=blend.SLOPE,
        blend_every=blend.LEARN_EVERY,
        gates=[[_gate(one) for one in by_layer] for by_layer in maps],
        history=statistics,
        counts=counts,
        owner=[one.weight for by_layer in maps for one in by_layer if isinstance(one, LinearMap)],
    )


def _gate(one: Any) -> Any:
    if one is None:
        return None
    rows, columns = one.weight.shape
    place = native.Place.make(BF16, rows, columns, [0], 0, 0, -1, 0)
    bias, ratio = ([] if part is None else part.float().tolist() for part in (one.bias, one.ratio))
    return place, one.weight.data_ptr(), bias, ratio


class NativePrefetcher(Prefetcher):
    """``Prefetcher`` with all but the beginning of a pass in C++. ``native.watch`` lets steps look ahead by themselves."""

    def __init__(self, residency: Any, predictor: Predictor, num_layers: int, look_ahead: int, chances: Any) -> None:
        """``chances``: of ``native_chances``, new."""
        super().__init__(residency, predictor, num_layers, look_ahead=look_ahead)
        self.native = native.Prefetcher.make(residency.native, chances, WASTE, PROTECTED_FROM, MAX_MISSING)

    def entered(self, layer: int, num_tokens: int) -> None:
        self.native.entered(layer, num_tokens)

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        if self._prefetching:
            self.native.observe(layer, list(routed))

    def layer_seconds(self, num_tokens: int) -> float:
        return float(self.native.layer_seconds(num_tokens))

    def prediction_of(self, layer: int) -> Sequence[tuple[int, float]]:
        predicted: list[tuple[int, float]] = self.native.predicted(layer)
        return predicted

    def _begin(self) -> None:
        self.native.begin()

    def _read(self, layer: int, router_input: torch.Tensor) -> None:
        x = router_input if router_input.dtype in (torch.float32, torch.bfloat16) else router_input.float()
        x = x.contiguous()
        self.native.look_ahead(layer, x.data_ptr(), DTYPES[x.dtype], len(x))
