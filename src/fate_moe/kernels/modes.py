"""torch's global modes, out of the way while something is made that has to be the same under all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["in_ram", "neutral"]


def in_ram() -> AbstractContextManager[Any]:
    """A context in which tensors made without a device are in RAM, whatever ``set_default_device`` chose: kernels get addresses.

    Where they are there anyway it is empty: in torch's own context every operation costs a call of Python.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextmanager
def neutral() -> Iterator[None]:
    """Within it torch is as it starts: fp32 and the CPU by default, no autocast, no inference mode (so no ``no_grad`` either).

    Kernels are given addresses of tensors made here, and what is made in inference mode can never take part in training.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            in_ram(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.inference_mode(False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
