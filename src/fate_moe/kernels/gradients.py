"""Gradients through frozen weights: kernels run the forward pass, the backward pass expands the weights again and uses torch.

The rule for all of them: the gradient is that of the numbers that stand for the weights, in the dtype of the input. What a kernel
rounds on the way forward (int8 activations) counts as not rounded (straight-through). Nothing of the weights is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fate_moe.errors import UnsupportedCallError

__all__ = ["flows", "frozen", "refuse_transforms"]


def flows(*tensors: torch.Tensor) -> bool:
    """Whether a gradient may be asked for with respect to one of ``tensors``, or to what it was computed from."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def refuse_transforms(*tensors: torch.Tensor) -> None:
    """Raise UnsupportedCallError within torch.func's transforms and forward-mode differentiation, which kernels know nothing of.

    ``tensors`` may be those of ``is_grads_batched``, which torch does not count as a transform.
    """
    batched = any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)
    if batched or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise UnsupportedCallError(
            "torch.func, vmap and forward-mode differentiation do not work through this model; use backward() or "
            "torch.autograd.grad"
        )


def frozen(
    compute: Callable[..., tuple[torch.Tensor, Any]],
    gradients: Callable[..., tuple[torch.Tensor | None, ...]],
    *inputs: torch.Tensor,
    keep: bool = True,
) -> torch.Tensor:
    """The first of what ``compute(*inputs)`` returns, differentiable once by ``gradients``.

    ``gradients(gradient, remembered, *inputs)`` gives the inputs' gradients; ``remembered`` is the second thing that ``compute``
    returned. Without ``keep`` the inputs are not kept for it, and not given. A second derivative raises UnsupportedCallError.
    """
    result: torch.Tensor = _Frozen.apply(compute, gradients, keep, *inputs)  # type: ignore[no-untyped-call]
    return result


class _Frozen(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]  # backward runs under the autocast of forward
    def forward(ctx: Any, compute: Any, gradients: Any, keep: bool, *inputs: torch.Tensor) -> torch.Tensor:
        result, ctx.remembered = compute(*inputs)
        ctx.gradients = gradients
        if keep:
            ctx.save_for_backward(*inputs)
        return result  # type: ignore[no-any-return]

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        refuse_transforms(gradient)  # is_grads_batched
        if torch.is_grad_enabled():
            raise UnsupportedCallError("gradients of gradients cannot be had through this model; leave create_graph=True out")
        return None, None, None, *ctx.gradients(gradient, ctx.remembered, *ctx.saved_tensors)
