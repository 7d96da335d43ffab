"""Scores a layer's experts from an earlier router input: by the layer's own router, or by a gate fitted for this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fate_moe.core import Routing
from fate_moe.kernels.native import BF16, DTYPES, multiplies_bf16, native

__all__ = ["Affine", "FittedGates", "LinearMap", "LinearRouters", "NotLinear", "RouterScorer", "Scorer", "Scorers"]


class Scorer(Protocol):
    """Scores a layer's experts."""

    def scores(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        """Scores fp32 [num_tokens, num_experts], higher is likelier, or None. Arguments: see core.Predictor.predict."""

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        """``layer``'s router chose the experts ``routed``."""
        return

    def map(self, layer: int, ahead: int) -> LinearMap | NotLinear | None:
        """What ``scores`` computes in the extension; None where it has no scores."""
        return NotLinear()


@dataclass(frozen=True)
class LinearMap:
    """The product of ``weight`` bf16 [E, D] with a router input, times ``ratio`` [D] in the input's dtype, plus ``bias`` [E]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    ratio: torch.Tensor | None = None


class NotLinear:
    """Scores that the extension does not compute."""


def _linear_map(weight: torch.Tensor, bias: torch.Tensor | None = None, ratio: torch.Tensor | None = None) -> LinearMap | NotLinear:
    return LinearMap(weight, bias, ratio) if _is_native(weight) else NotLinear()


class FittedGates(Scorer):
    """Affine maps [E, D + 1] by layer and look-ahead, from the router input that many layers before.

    ``FittedGates(one, two, ...)``: for each look-ahead a list by layer; None where nothing was fitted. The embedding is the router
    input of layer -1. Stored in bf16 if the extension multiplies bf16 at this width, which is faster, else in fp32.
    """

    def __init__(self, *by_ahead: Sequence[torch.Tensor | None]) -> None:
        self._maps = [[None if weight is None else Affine(weight) for weight in weights] for weights in by_ahead]

    def scores(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        gate = self._gate(layer, ahead)
        return None if gate is None else gate(router_input)

    def map(self, layer: int, ahead: int) -> LinearMap | NotLinear | None:
        gate = self._gate(layer, ahead)
        return None if gate is None else _linear_map(gate.weight, gate.bias)

    def _gate(self, layer: int, ahead: int) -> Affine | None:
        return self._maps[ahead - 1][layer] if ahead <= len(self._maps) else None


class RouterScorer(Scorer):
    """The layer's own router, applied to an earlier layer's router input (Fate); no scores from the embedding."""

    def __init__(self, routers: Sequence[Callable[[torch.Tensor], Routing] | None]) -> None:
        self._routers = routers

    def scores(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        route = self._routers[layer]
        return None if layer < ahead or route is None else route(router_input).scores.float()


class Scorers(Scorer):
    """The scores of the first of several scorers that has any."""

    def __init__(self, *scorers: Scorer) -> None:
        self._scorers = scorers

    def scores(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        return next((s for scorer in self._scorers if (s := scorer.scores(layer, router_input, ahead)) is not None), None)

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        for scorer in self._scorers:
            scorer.observe(layer, routed)

    def map(self, layer: int, ahead: int) -> LinearMap | NotLinear | None:
        return next((found for scorer in self._scorers if (found := scorer.map(layer, ahead)) is not None), None)


class LinearRouters(Scorer):
    """As RouterScorer, for routers that are one matrix [E, D] each, without softmax and top-k; the matrices are not copied.

    With ``norms`` [L, D], the gains of the norms before the routers, the router input is rescaled from the earlier layer's norm to
    the router's own, which improves the prediction slightly.
    """

    def __init__(self, routers: Sequence[torch.Tensor], norms: torch.Tensor | None = None) -> None:
        self._routers = list(routers)
        self._products = [_product(weight) for weight in routers]
        self._norms = None if norms is None else norms.float()
        self._ratios: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}  # [D] by (source layer, predicted layer, dtype)

    def scores(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> torch.Tensor | None:
        if layer < ahead:
            return None
        x = router_input if self._norms is None else router_input * self._ratio(layer - ahead, layer, router_input.dtype)
        return self._products[layer](x)

    def map(self, layer: int, ahead: int) -> LinearMap | NotLinear | None:
        if layer < ahead:
            return None
        ratio = None if self._norms is None else self._ratio(layer - ahead, layer, torch.float32)
        return _linear_map(self._routers[layer], None, ratio)

    def matrix(self, layer: int, ahead: int) -> torch.Tensor:
        """The matrix of ``scores`` in the form of FittedGates, [E, D + 1]. ``layer`` must be at least ``ahead``."""
        weight = self._routers[layer].float()
        return torch.nn.functional.pad(
            weight if self._norms is None else weight * self._ratio(layer - ahead, layer, weight.dtype), (0, 1)
        )

    def _ratio(self, source: int, layer: int, dtype: torch.dtype) -> torch.Tensor:
        assert self._norms is not None
        ratio = self._ratios.get((source, layer, dtype))
        if ratio is None:
            here, there = self._norms[source], self._norms[layer]
            nonzero = here.abs() > 1e-3 * here.abs().max()
            ratio = torch.where(nonzero, there / torch.where(nonzero, here, 1.0), 1.0).to(dtype)
            self._ratios[source, layer, dtype] = ratio
        return ratio


class Affine:
    """x [n, D] -> [n, E] fp32 by a matrix [E, D + 1], the bias last; in bf16 if the extension multiplies bf16 at this width."""

    def __init__(self, matrix: torch.Tensor) -> None:
        matrix, self.bias = matrix[:, :-1], matrix[:, -1].float().contiguous()
        self.weight = matrix.to(torch.bfloat16 if multiplies_bf16(matrix.shape[1]) else torch.float32).contiguous()
        self._product = _product(self.weight, self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)


def _is_native(weight: torch.Tensor) -> bool:
    return multiplies_bf16(weight.shape[1]) and weight.dtype == torch.bfloat16 and weight.is_contiguous()


def _product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [n, D] -> [n, E] fp32 by ``weight`` [E, D] and ``bias`` [E], which are not copied."""
    rows, columns = weight.shape
    if not _is_native(weight):
        full = weight.float()
        return lambda x: torch.nn.functional.linear(x.float(), full, bias)
    place: Any = native.Place.make(BF16, rows, columns, [0], 0, 0, -1, 0)
    fp32 = DTYPES[torch.float32]

    def product(x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_contiguous():
            x = x.float().contiguous()
        out = torch.empty(len(x), rows, dtype=torch.float32)
        native.linear(place, weight.data_ptr(), 0, x.data_ptr(), DTYPES[x.dtype], len(x), out.data_ptr(), fp32, True, 1)
        return out if bias is None else out.add_(bias)

    return product
