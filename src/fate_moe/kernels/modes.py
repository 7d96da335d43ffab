"""torch's global modes, out of the way while something is made that has to be the same under all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["neutral"]


@contextmanager
def neutral() -> Iterator[None]:
    """Within it torch is as it starts: fp32 and the CPU by default, no autocast, no inference mode (so no ``no_grad`` either).

    Kernels are given addresses of tensors made here, and what is made in inference mode can never take part in training.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.inference_mode(False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
