"""How many bits of a missing expert are worth reading now. Precision policies see shares and sizes, never bytes or tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from fate_moe.core import Need, PrecisionPolicy
from fate_moe.errors import ConfigError

__all__ = ["Budget", "GateWeighted", "PrefillPopularity", "make_precision_policy"]


class PrefillPopularity:
    """Fate's: in prefill the least popular experts, together at most ``share`` of the routed tokens, are read as ``bits``.

    The others, and all of them in decode, are read whole. Fate reads 2 bits, which costs the embedded model 2.8 % of perplexity
    where 3 cost 1.0 % (docs/quality.md)."""

    def __init__(self, share: float = 0.25, bits: int = 3) -> None:
        self._share, self._bits = share, bits

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        chosen = [views[-1]] * len(needs)
        if max((need.num_tokens for need in needs), default=0) < 2:  # one token, or none that shares an expert: not prefill
            return chosen
        short = _at_least(views, self._bits)
        order = sorted(range(len(needs)), key=lambda i: needs[i].num_tokens)
        total = sum(need.num_tokens for need in needs)
        for i, together in zip(order, accumulate(needs[i].num_tokens for i in order), strict=True):
            if together > self._share * total:
                break
            chosen[i] = short
        return chosen


class GateWeighted:
    """In decode, by an expert's gate weight against the mean of the pass's choices: below ``light`` of it the shortest view is
    read, below ``heavy`` the next longer one, the rest whole. A view that is held already stays, unless the expert weighs more
    than ``upgrade``: each upgrade is a read where there was a hit (docs/quality.md)."""

    def __init__(self, light: float = 0.8, heavy: float = 0.8, upgrade: float = 1.6) -> None:
        self._light, self._heavy, self._upgrade = light, heavy, upgrade

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        choices = sum(need.num_tokens for need in needs)
        if choices >= 2 * len(needs):  # a prompt, of which an expert's tokens weigh much and little
            return [views[-1]] * len(needs)
        mean = sum(need.weight for need in needs) / max(1, choices)
        return [self._view(need, mean * need.num_tokens, views) for need in needs]

    def _view(self, need: Need, mean: float, views: Sequence[int]) -> int:
        if need.held and need.weight <= self._upgrade * mean:
            return need.held
        shorter = views[:-1][-2:]
        if need.weight < self._light * mean or not mean:
            return (*shorter, views[-1])[0]
        return shorter[-1] if shorter and need.weight < self._heavy * mean else views[-1]


class Budget:
    """As many bits as can be read while the layer computes: everything starts as the shortest view, and the heaviest missing
    experts are read longer, one step each in turn, while it fits. So a fast link reads all, a slow one what it can."""

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
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


def make_precision_policy(name: str) -> PrecisionPolicy | None:
    """The precision policy called ``name`` (one of config.PRECISION_POLICIES); None is ``full``: always everything.

    Raises ConfigError for an unknown name.
    """
    if name == "full":
        return None
    known: dict[str, Callable[[], PrecisionPolicy]] = {
        "budget": Budget,
        "gate-weighted": GateWeighted,
        "prefill-popularity": PrefillPopularity,
    }
    if name not in known:
        raise ConfigError(f"precision policy {name!r} is not one of full, {', '.join(known)}")
    return known[name]()


def _at_least(views: Sequence[int], bits: int) -> int:
    return next((view for view in views if view >= bits), views[-1])
