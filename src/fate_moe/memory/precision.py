"""How many bits of a missing expert to read now. Precision policies see weights and sizes, never bytes or tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from fate_moe.core import Need, PrecisionPolicy
from fate_moe.errors import ConfigError

__all__ = ["Budget", "FixedView", "PrefillPopularity", "RoutingWeighted", "make_precision_policy"]

# Nats that a token's prediction loses when every expert is read as a view of so many bits: a property of the model, which
# `fate convert --calibrate` measures. Without a measurement: the most sensitive model measured (docs/notebook/quality.md).
UNMEASURED = {2: 4.0, 3: 0.6}
# What prefill-popularity may lose, in nats: losses are nearly proportional to the fraction of tokens (docs/notebook/quality.md).
PREFILL_LOSS = 0.01
# routing-weighted: a view is read below so many mean routing weights over the root of the view's loss.
GATE_LOSS = 0.4
# budget reads no view that loses more than this.
BUDGET_LOSS = 0.05


class FixedView:
    """For measuring: every expert as the view of so many bits."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        return [self._bits] * len(needs)


class PrefillPopularity:
    """Fate's: in prefill the least popular experts, together at most ``share`` of the routed tokens, are read as ``bits``.

    The others, and all of them in decode, are read whole. Fate reads 2 bits, which costs the embedded model 2.8 % of perplexity
    where 3 cost 1.0 % (docs/notebook/quality.md). ``losses`` by view (None: not asked) may make the share smaller."""

    def __init__(self, share: float = 0.25, bits: int = 3, losses: Mapping[int, float] | None = None) -> None:
        self._share, self._bits, self._losses = share, bits, losses

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        chosen = [views[-1]] * len(needs)
        if max((need.num_tokens for need in needs), default=0) < 2:  # one token, or none that shares an expert: not prefill
            return chosen
        short = _at_least(views, self._bits)
        order = sorted(range(len(needs)), key=lambda i: needs[i].num_tokens)
        most = self._share * sum(need.num_tokens for need in needs)
        if self._losses is not None and short < views[-1]:
            most *= min(1.0, PREFILL_LOSS / self._share / _loss(self._losses, short))
        for i, together in zip(order, accumulate(needs[i].num_tokens for i in order), strict=True):
            if together > most:
                break
            chosen[i] = short
        return chosen


class RoutingWeighted:
    """In decode, by an expert's routing weight against the mean of the pass's choices: below ``light`` of it the shortest view is
    read, below ``heavy`` the next longer one, the rest whole. A view that is held already stays, unless the expert weighs more
    than ``upgrade``: each upgrade is a read where there was a hit (docs/notebook/quality.md). ``losses`` by view (None: not asked)
    make the limits of a view that loses much smaller, by one factor for reading and keeping it."""

    def __init__(
        self, light: float = 0.8, heavy: float = 0.8, upgrade: float = 1.6, losses: Mapping[int, float] | None = None
    ) -> None:
        self._light, self._heavy, self._upgrade, self._losses = light, heavy, upgrade, losses

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        choices = sum(need.num_tokens for need in needs)
        if choices >= 2 * len(needs):  # a prompt, of which an expert's tokens weigh much and little
            return [views[-1]] * len(needs)
        mean = sum(need.weight for need in needs) / max(1, choices)
        return [self._view(need, mean * need.num_tokens, views) for need in needs]

    def _view(self, need: Need, mean: float, views: Sequence[int]) -> int:
        shorter = views[:-1][-2:]
        limits = dict(zip(shorter, (self._light, self._heavy)[-len(shorter) :], strict=False))
        if need.held and need.weight <= self._upgrade * mean * self._factor(need.held, limits):
            return need.held
        for view, limit in limits.items():
            if need.weight < limit * mean * self._factor(view, limits) or not mean:
                return view
        return views[-1]

    def _factor(self, view: int, limits: Mapping[int, float]) -> float:
        """What the view's loss leaves of its limits; whole experts lose nothing."""
        if self._losses is None or not limits.get(view):
            return 1.0
        return min(1.0, GATE_LOSS / limits[view] / math.sqrt(_loss(self._losses, view)))


class Budget:
    """As many bits as can be read while the layer computes: everything starts as the shortest view, and the heaviest missing
    experts are read longer, one step each in turn, while it fits. So a fast link reads all, a slow one what it can. With
    ``losses`` by view (None: not asked) views that lose too much are not read."""

    def __init__(self, losses: Mapping[int, float] | None = None) -> None:
        self._losses = losses

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        if self._losses is not None:
            views = [*(view for view in views[:-1] if _loss(self._losses, view) <= BUDGET_LOSS), views[-1]]
        missing = [i for i, need in enumerate(needs) if need.held < views[-1]]
        chosen = [max(need.held, views[0]) for need in needs]
        left = affordable - sum(chosen[i] - needs[i].held for i in missing)
        heaviest = sorted(missing, key=lambda i: -needs[i].weight)
        for view in views[1:]:
            for i in heaviest:
                more = view - chosen[i]
                if 0 < more <= left:
                    chosen[i], left = view, left - more
        return chosen


def make_precision_policy(name: str, losses: Mapping[int, float] | None = None) -> PrecisionPolicy | None:
    """The precision policy called ``name`` (one of config.PRECISION_POLICIES); None is ``full``: always everything.

    ``losses``: nats lost by view, as measured on this model; None: taken for the most sensitive one's.
    Raises ConfigError for an unknown name.
    """
    if name == "full":
        return None
    losses = UNMEASURED if losses is None else losses
    known: dict[str, Callable[..., PrecisionPolicy]] = {
        "budget": Budget,
        "routing-weighted": RoutingWeighted,
        "prefill-popularity": PrefillPopularity,
    }
    if name not in known:
        raise ConfigError(f"precision policy {name!r} is not one of full, {', '.join(known)}")
    return known[name](losses=losses)


def _loss(losses: Mapping[int, float], view: int) -> float:
    """Never nothing: a text can be predicted better by chance."""
    return max(losses.get(view, math.inf), 1e-6)


def _at_least(views: Sequence[int], bits: int) -> int:
    return next((view for view in views if view >= bits), views[-1])
