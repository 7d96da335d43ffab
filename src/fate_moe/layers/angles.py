"""The angles by which a whole pass turns queries and keys: tables that the model's own rotary modules make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fate_moe.layers.attentions import cos_and_sin
from fate_moe.layers.canonical import ROPES, TRUNKS, meaning_of

__all__ = ["Angles", "angle_reasons", "angles_of", "on_axes"]

_MORE_ANGLES = 4096  # positions that a table of angles is ahead: of long texts it has megabytes


def angle_reasons(trunk: Any) -> list[str]:
    """Why no table of angles serves all calls of a known ``trunk``; none if one does."""
    reasons = list[str]()
    for rope in _ropes_of(trunk):
        code, kinds = meaning_of(type(rope), ROPES), getattr(rope, "rope_type", "default")
        if code is None:
            reasons.append(f"{type(rope).__name__} makes rotary frequencies in a way that is not known")
            continue
        others = (set(kinds.values()) if isinstance(kinds, dict) else {kinds}) - code.kinds
        reasons += [f"its rotary frequencies ({kind}) depend on how long a text is" for kind in sorted(others)]
        parameters = getattr(rope.config, "rope_parameters", None) or {}
        if code.long_scales and len({parameters.get(name) for name in code.long_scales}) > 1:
            reasons.append("its rotary angles are scaled otherwise in long texts")
    return reasons


def on_axes(rope: Any, positions: torch.Tensor) -> torch.Tensor:
    """``positions`` int64 [batch, n] of a text as ``rope`` takes them: these, or [axes, batch, n]."""
    code = meaning_of(type(rope), ROPES)
    return positions if code is None or not code.axes else positions.expand(code.axes, *positions.shape)


def _ropes_of(trunk: Any) -> list[Any]:
    return list(getattr(trunk, "rotary_embs", ())) or [trunk.rotary_emb]


def angles_of(trunk: Any, indices: Sequence[int]) -> tuple[list[Angles], list[int]]:
    """All kinds of angles that layers turn by, and the kind of each of the layers ``indices``."""
    code, config = meaning_of(type(trunk), TRUNKS), trunk.config
    if code is not None and code.by_kind:
        names = list(dict.fromkeys(config.layer_types))
        return [Angles(trunk.rotary_emb, name) for name in names], [names.index(config.layer_types[index]) for index in indices]
    if code is not None and code.by_base:
        bases = [rope.config.rope_parameters["rope_theta"] for rope in trunk.rotary_embs]
        of_layers = [config.layer_rope_theta[index] for index in indices]
        return list(map(Angles, trunk.rotary_embs)), [bases.index(base) if base else 0 for base in of_layers]
    return [Angles(trunk.rotary_emb)], [0] * len(indices)


class Angles:
    """cos and sin of positions fp32 [n, num_angles], from a table that the model's own module makes; of a ``kind`` of layer, if it
    knows several."""

    def __init__(self, rope: Any, kind: str | None = None) -> None:
        self._rope, self._kind = rope, [] if kind is None else [kind]
        self._names = [f"{kind}_{name}" if kind else name for name in ("inv_freq", "attention_scaling")]
        self._found = [getattr(rope, name) for name in self._names]
        self._table = (torch.empty(0, 0), torch.empty(0, 0))

    def same(self) -> bool:
        """Whether the module is as it was found."""
        frequencies, scaling = (getattr(self._rope, name) for name in self._names)
        return frequencies is self._found[0] and scaling == self._found[1]

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``positions`` int64 [n]."""
        last = int(positions[-1]) if len(positions) == 1 else int(positions.max())
        if last >= len(self._table[0]):
            every = on_axes(self._rope, torch.arange(max(256, min(last + last // 2, last + _MORE_ANGLES)))[None])
            cos, sin = cos_and_sin(self._rope(torch.empty(0, dtype=torch.bfloat16), every, *self._kind))
            self._table = cos[0].float().contiguous(), sin[0].float().contiguous()
        if len(positions) == 1:
            return self._table[0][last], self._table[1][last]
        return self._table[0][positions], self._table[1][positions]
