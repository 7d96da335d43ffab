"""Settings of torch that a caller may have changed and that would change numbers: refused in a pass.

kernels/modes.py sets such settings aside while a model is loaded.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fate_moe.core import Patcher
from fate_moe.errors import ConfigError
from fate_moe.kernels.selfcheck import fp32_precision

__all__ = ["refuse_settings"]


def refuse_settings(model: Any, patcher: Patcher) -> None:
    """Let a pass of ``model`` raise ConfigError under settings of torch that would change its numbers, or crash its kernels."""
    kind = model.device.type

    def refuse(module: nn.Module, args: tuple[Any, ...]) -> None:
        if kind == "cpu" and fp32_precision() == "bf16":
            raise ConfigError("torch.set_float32_matmul_precision('medium') changes this model's numbers; set it to 'highest'")

    patcher.hook(model, "before", refuse)
