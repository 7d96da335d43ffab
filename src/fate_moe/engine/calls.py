"""Calls of a loaded model: threads take turns, and what cannot be computed is refused."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.core import Patcher
from fate_moe.errors import ClosedModelError, ConfigError, UnsupportedCallError
from fate_moe.kernels.gradients import refuse_transforms
from fate_moe.kernels.modes import in_ram
from fate_moe.kernels.selfcheck import fp32_precision
from fate_moe.turns import Turn

__all__ = ["Calls"]

_EAGER = "fate-moe runs its layers in an extension: there is nothing to compile"


class Calls:
    """Lets calls of one model take turns.

    A whole ``generate`` is one turn, so that sequences do not mix; a forward pass outside of it is one. The thread whose turn it is
    may call the model again between two passes (a streamer, a logits processor). ``passing`` is held during a pass and by whoever
    changes what a pass uses: so ``close`` waits for a pass, not for a whole ``generate``, which ends at its next pass.
    """

    def __init__(self, passing: Turn | None = None, cut_short: Callable[[], None] = lambda: None) -> None:
        """``passing``: the turn of a pass, where another object uses it too. ``cut_short`` is called after a pass that raised."""
        self.turn, self.passing, self._cut_short = Turn(), passing or Turn(), cut_short
        self.closed = False
        self._process = os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that loaded the model: the reading threads are not here."""
        return os.getpid() != self._process

    def guard(self, model: Any, stacks: Sequence[ExpertStack], patcher: Patcher) -> None:
        """Let ``model``'s generate and forward take turns, and the forwards of the modules that hold all its layers.

        Comes after all other changes: it wraps the methods that it finds.
        """
        patcher.replace(model, "generate", self._in_turn(model.generate, self._generating))
        passing = partial(self.one_pass, model.device.type)
        for module in _above_layers(model, stacks):
            forward = self._in_turn(module.forward, passing)
            patcher.replace(module, "forward", torch.compiler.disable(forward, reason=_EAGER))  # type: ignore[no-untyped-call]

    def _in_turn(self, method: Callable[..., Any], turn: Callable[[], Any]) -> Callable[..., Any]:
        @functools.wraps(method)  # transformers looks at the signature
        def call(*args: Any, **kwargs: Any) -> Any:
            with turn():
                return method(*args, **kwargs)

        return call

    @contextmanager
    def _generating(self) -> Iterator[None]:
        self._check()
        with self.turn:
            self._check()  # closed while it waited
            yield

    @contextmanager
    def one_pass(self, device: str) -> Iterator[None]:
        """A turn of one forward pass, with what it checks first. ``device``: the model's, "cpu" or "cuda"."""
        self._check()
        _refuse_tracing()
        _refuse_rounded_products(device)
        with self.turn, self.passing, in_ram():
            self._check()
            try:
                yield
            except BaseException:
                self._cut_short()
                raise

    def _check(self) -> None:
        if self.closed:
            raise ClosedModelError
        if self.is_forked:
            raise UnsupportedCallError(
                "this process was forked after the model was loaded, and the threads that read experts stayed in its parent; load "
                "the model in the child, or start the child first"
            )


def _above_layers(model: nn.Module, stacks: Sequence[ExpertStack]) -> list[nn.Module]:
    """``model`` and the modules inside it that contain all its MoE layers and can be called."""
    first, *others = [stack.name.split(".") for stack in stacks]
    found = [model]
    for end in range(1, len(first)):
        if all(name[:end] == first[:end] for name in others):
            found.append(model.get_submodule(".".join(first[:end])))
    return [module for module in found if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]


def _refuse_tracing() -> None:
    """Raise UnsupportedCallError where torch records operations instead of computing: it would not see the kernels."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        raise UnsupportedCallError("a loaded model cannot be traced or exported; export the checkpoint with transformers instead")
    refuse_transforms()


def _refuse_rounded_products(device: str) -> None:
    """Raise ConfigError under a setting of torch that changes the numbers of a model on the CPU (loading has set it aside)."""
    if device == "cpu" and fp32_precision() == "bf16":
        raise ConfigError("torch.set_float32_matmul_precision('medium') changes this model's numbers; set it to 'highest'")
