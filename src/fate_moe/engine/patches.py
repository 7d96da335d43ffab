"""Every change that an engine makes to the user's model: listed, and undone when the engine is closed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Patch", "Patches"]

_MISSING = object()
_TABLES = ("_parameters", "_buffers", "_modules")  # where torch keeps a module's named parts


@dataclass(frozen=True)
class Patch:
    """One change: ``what`` of the model (a dotted path), what it became, and the call that takes it back (its argument: see
    ``Patches.undo``)."""

    what: str
    became: str
    undo: Callable[[Any], None]


class Patches:
    """The changes to ``model``, in the order in which they were made.

    Only this class writes to the model. ``undo`` takes the changes back in reverse order, so that the model is as it was found;
    it may be called again. Not thread-safe.

    >>> patches.replace(model.model.layers[0], "forward", step)
    >>> patches.hook(model, "before", limit, with_kwargs=True)
    >>> print(patches.describe())
    model: forward pre-hook limit
    model.layers.*.forward: CpuStep (24 times)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        self._made: list[Patch] = []

    def __len__(self) -> int:
        return len(self._made)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name`` becomes ``value``: a forward, a parameter, a buffer, a submodule or a plain attribute.

        A parameter or buffer takes the place of the old one whatever its shape, dtype and device.
        """
        table = _table(owner, name, value)
        old = table.get(name, _MISSING)
        table[name] = value

        def undo(forward: Any) -> None:
            if name == "forward" and forward is not None:
                table[name] = forward
            elif old is _MISSING:
                table.pop(name, None)
            else:
                table[name] = old

        self._made.append(Patch(f"{self._name(owner)}.{name}".lstrip("."), _kind(value), undo))

    def hook(self, module: nn.Module, when: str, function: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """Call ``function`` "before" or "after" each forward of ``module``, as torch's forward (pre-)hooks do.

        Raises ValueError for another ``when``.
        """
        if when not in ("before", "after"):
            raise ValueError(f"a hook runs before or after a forward, not {when!r}")
        register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
        handle = register(function, with_kwargs=with_kwargs)
        kind = "forward pre-hook" if when == "before" else "forward hook"
        self._made.append(Patch(self._name(module) or "model", f"{kind} {_kind(function)}", lambda forward: handle.remove()))

    def record(self, change: Callable[[], Any]) -> None:
        """Call ``change``, a library's own function, and list the parameters, buffers and submodules that it replaced."""
        tables = [(module, vars(module)[kind]) for module in self._model.modules() for kind in _TABLES]
        before = [dict(table) for _, table in tables]
        change()
        for (module, table), old in zip(tables, before, strict=True):
            for name, value in list(table.items()):
                if value is not old.get(name):
                    table[name] = old.get(name)
                    self.replace(module, name, value)

    def describe(self) -> str:
        """The changes for people, one line a kind: equal changes of numbered layers are counted, not repeated."""
        counts: dict[tuple[str, str], int] = {}
        for patch in self._made:
            key = re.sub(r"(?<=\.)\d+(?=\.)", "*", patch.what), patch.became
            counts[key] = counts.get(key, 0) + 1
        return "\n".join(
            f"{what}: {became}" + (f" ({count} times)" if count > 1 else "") for (what, became), count in counts.items()
        )

    def undo(self, forward: Callable[..., Any] | None = None) -> None:
        """Take every change back, the last one first.

        ``forward``: what replaced forwards become instead of the originals, which no other thread may call in between.
        """
        while self._made:
            self._made.pop().undo(forward)

    def _name(self, owner: Any) -> str:
        if not isinstance(owner, nn.Module):
            return type(owner).__name__
        if id(owner) not in self._names:
            self._names = {id(module): name for name, module in self._model.named_modules()}
        return self._names.get(id(owner), type(owner).__name__)


def _table(owner: Any, name: str, value: Any) -> dict[str, Any]:
    """The dictionary in which ``owner`` keeps ``name``."""
    attributes: dict[str, Any] = vars(owner)
    if not isinstance(owner, nn.Module):
        return attributes
    table: dict[str, Any]
    for table in (attributes[kind] for kind in _TABLES):
        if name in table:
            return table
    return attributes["_modules"] if isinstance(value, nn.Module) else attributes


def _kind(value: Any) -> str:
    return str(getattr(value, "__name__", None) or type(value).__name__)
