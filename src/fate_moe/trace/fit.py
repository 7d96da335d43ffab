"""Fits gates that predict a layer's choice better than its own router does early: ridge regression on the model's own routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fate_moe.journal import ForwardPass
from fate_moe.predict.forecast import forecast_source

__all__ = ["GateFitter", "Passes"]

RIDGE = 3e-3  # of the inputs' mean square; between 1e-3 and 1e-2 recall differs by less than 0.1 points


class Passes:
    """An observer of whole passes of many tokens; ``whole_pass`` defines what is done with each."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers

    def whole_pass(self, inputs: list[torch.Tensor], chosen: list[torch.Tensor]) -> None:
        """``inputs``: embeddings, then router inputs by layer, [num_tokens, hidden]; ``chosen`` [num_tokens, k] by layer."""
        raise NotImplementedError

    def keeps_inputs(self, num_tokens: int) -> bool:
        """Every pass is recorded with its inputs."""
        return True

    def record(self, forward: ForwardPass) -> None:
        """Passes that did not go through all layers are omitted."""
        inputs = [forward.embeddings, *(step.router_input for step in forward.layers)]
        known = [tensor for tensor in inputs if tensor is not None]
        if forward.is_whole(self._num_layers) and len(known) == len(inputs):
            self.whole_pass(known, [step.experts for step in forward.layers])


class GateFitter(Passes):
    """Accumulates the sums that ridge regression needs; nothing is stored per token.

    The gate of layer l with look-ahead a maps the router input of layer l - a (layer -1's is the embedding) to the logits of layer
    l's router (``routers`` [E, hidden] by layer) for its own input, less their mean; a goes up to ``look_ahead``. Without
    ``routers`` the target is which experts layer l chose (1 or 0), from which much less is learned per token. With ``forecast``
    there is also a gate from the embedding and the previous token's router input at the same layer (predict.forecast), which needs
    the products between the two besides. Memory, floats per layer: (hidden + 1)^2, with the forecast twice that, and
    (hidden + 1) * experts for each target.
    """

    def __init__(
        self,
        experts_per_layer: Sequence[int],
        hidden: int,
        look_ahead: int = 1,
        *,
        forecast: bool = False,
        routers: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__(len(experts_per_layer))
        self.look_ahead = min(look_ahead, len(experts_per_layer))
        self._sizes = list(experts_per_layer)
        self._sources = [_Source(hidden, sum(self._sizes[at : at + self.look_ahead])) for at in range(len(self._sizes))]
        self._whole = [_Whole(hidden, size) for size in self._sizes] if forecast else []
        self._routers = routers

    def whole_pass(self, inputs: list[torch.Tensor], chosen: list[torch.Tensor]) -> None:
        if self._routers is None:
            targets = [torch.zeros(len(i), size).scatter_(1, i, 1.0) for i, size in zip(chosen, self._sizes, strict=True)]
        else:
            logits = [x.float() @ weight.float().mT for x, weight in zip(inputs[1:], self._routers, strict=True)]
            targets = [row - row.mean(1, keepdim=True) for row in logits]
        padded = [torch.nn.functional.pad(x.float(), (0, 1), value=1.0) for x in inputs[: len(self._sizes)]]
        for at, source in enumerate(self._sources):
            source.add(padded[at], torch.cat(targets[at : at + self.look_ahead], 1), first=at == 0)
        for layer, whole in enumerate(self._whole):
            before = padded[1 + forecast_source(layer, len(self._sizes))] if len(self._sizes) > 1 else padded[0]
            whole.add(padded[0][1:], before[:-1], targets[layer][1:])

    def gates(self, advance: Callable[[int], None] = lambda layers: None) -> list[list[torch.Tensor | None]]:
        """By look-ahead and layer, [num_experts, hidden + 1] or None; ``advance`` gets the number of layers that are done.

        Raises ValueError if no pass was recorded."""
        found: list[list[torch.Tensor | None]] = [[None] * len(self._sizes) for _ in range(self.look_ahead)]
        for at, source in enumerate(self._sources):
            sizes = self._sizes[at : at + self.look_ahead]
            for ahead, gate in enumerate(torch.split(_solve(source.squares, source.products), sizes)):
                found[ahead][at + ahead] = gate.contiguous()
            advance(1)
        return found

    def forecast(self, advance: Callable[[int], None] = lambda layers: None) -> list[torch.Tensor]:
        """By layer, [num_experts, 2 * hidden + 1]; empty without ``forecast``."""
        weights = []
        for layer, whole in enumerate(self._whole):
            before = self._sources[1 + forecast_source(layer, len(self._sizes)) if len(self._sizes) > 1 else 0]
            weights.append(whole.solve(self._sources[0].shifted(), before.shifted()))
            advance(1)
        return weights


class _Source:
    """Sums over tokens of one input, x [num_tokens, hidden + 1] with a last column of ones."""

    def __init__(self, hidden: int, targets: int) -> None:
        self.squares = torch.zeros(hidden + 1, hidden + 1)
        self.products = torch.zeros(hidden + 1, targets)
        self._ends: list[
            torch.Tensor
        ] = []  # rows that a forecast does not use: the first embedding of a pass, the last router input

    def add(self, x: torch.Tensor, target: torch.Tensor, *, first: bool) -> None:
        self.squares.addmm_(x.mT, x)
        self.products.addmm_(x.mT, target)
        self._ends.append(x[0 if first else -1].clone())

    def shifted(self) -> torch.Tensor:
        """``squares`` without the passes' ends."""
        ends = torch.stack(self._ends)
        return self.squares - ends.mT @ ends


class _Whole:
    """The sums for (embedding, previous token's router input, 1) that the two sources do not have."""

    def __init__(self, hidden: int, targets: int) -> None:
        self._between = torch.zeros(hidden + 1, hidden + 1)
        self._of_token = torch.zeros(hidden + 1, targets)
        self._of_before = torch.zeros(hidden + 1, targets)

    def add(self, token: torch.Tensor, before: torch.Tensor, target: torch.Tensor) -> None:
        self._between.addmm_(token.mT, before)
        self._of_token.addmm_(token.mT, target)
        self._of_before.addmm_(before.mT, target)

    def solve(self, token: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """[targets, 2 * hidden + 1], from both sources' squares over the same tokens."""
        of_token = torch.cat([token[:-1, :-1], self._between[:-1]], 1)
        squares = torch.cat([of_token, torch.cat([self._between[:-1].mT, before], 1)])
        return _solve(squares, torch.cat([self._of_token[:-1], self._of_before]))


def _solve(squares: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """[targets, width]: the ridge regression with these sums."""
    mean_square = float(squares.diagonal().mean())
    if not mean_square:
        raise ValueError("a layer ran for no token")
    damped = squares.double()
    damped.diagonal().add_(RIDGE * mean_square)
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_solve(products.double(), factor).mT.float().contiguous()
