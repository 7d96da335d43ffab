"""torch's global modes, out of the way while something is made that has to be the same under all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["usual_modes"]


@contextmanager
def usual_modes() -> Iterator[None]:
    """Within it torch is as it starts: fp32 and the CPU by default, no inference mode, no autocast.

    Kernels are given addresses of tensors made here, and modules made in inference mode could never be trained beside.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
