"""Parameters whose numbers are not in memory: they can be looked at and computed with, but neither changed nor trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding
from torch.utils._pytree import tree_map

from fate_moe.core import Patcher
from fate_moe.errors import UnsupportedCallError
from fate_moe.kernels.gradients import refuse_transforms

__all__ = ["FrozenWeight", "freeze_experts"]

_EXPERTS = (
    "the experts' weights stay in the store, where they cannot be changed, trained or adapted; leave the experts out of what is "
    "trained (LoRA: target_modules of attention, shared experts and dense layers, no target_parameters of experts)"
)
_log = logging.getLogger(__name__)
_COPIED = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_CONVERTED = torch.ops.aten._to_copy.default


Rows = Callable[[Sequence[int]], torch.Tensor]


class FrozenWeight(nn.Parameter):
    """Has shape, dtype and device of a weight; ``numbers`` makes its numbers anew for whoever computes with it.

    ``rows``, of a matrix that is an embedding, makes those of the given rows alone [n, dim], for torch's ``embedding`` and for
    ``weight[token]``: the family's own module can keep such a weight, whatever else it does with what it looked up.

    Changing it or asking for its gradient raises UnsupportedCallError with ``refusal``: no library is to edit a copy and take it
    for the weight (merging an adapter, initializing one from the weight). Put another Parameter in its place to change a weight.
    """

    numbers: Callable[[], torch.Tensor]
    refusal: str
    rows: Rows | None

    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: str,
        numbers: Callable[[], torch.Tensor],
        refusal: str,
        rows: Rows | None = None,
    ) -> FrozenWeight:
        # What lies beneath, where torch is made to look past this class (other.data = weight), is NaN rather than no memory.
        with torch.inference_mode(False):  # detach() in inference mode wants one that has versions
            nothing = torch.full((), torch.nan, dtype=dtype, device=device).expand(*shape)
            made: FrozenWeight = torch.Tensor._make_subclass(cls, nothing, False)
        made.numbers, made.refusal, made.rows = numbers, refusal, rows
        return made

    def __init__(self, *args: Any) -> None:
        """All is done by ``__new__``."""

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> Any:
        raise UnsupportedCallError(self.refusal)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedCallError(self.refusal)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is embedding and (rows := getattr(args[1], "rows", None)) is not None and (kwargs or {}).get("max_norm") is None:
            with torch._C.DisableTorchFunctionSubclass():
                return _looked_up(rows, args[0], args[1])
        name, of = getattr(func, "__name__", ""), getattr(getattr(func, "__self__", None), "__name__", "")
        first = args[0] if args else None
        if isinstance(first, FrozenWeight):
            if name == "__getitem__" and first.rows is not None and (token := _one_row(args[1])) is not None:
                return first.rows([token])[0].to(first.dtype)
            if name == "requires_grad_" or (name == "__set__" and of == "requires_grad"):
                if args[1] if len(args) > 1 else (kwargs or {}).get("requires_grad", True):
                    raise UnsupportedCallError(first.refusal)
            elif name == "__set__" and of == "data":
                if not (isinstance(args[1], FrozenWeight) and args[1].numbers is first.numbers):
                    raise UnsupportedCallError(first.refusal)  # but model.to(dtype) may
            elif name == "__setitem__":  # would write to the numbers that were made for it
                raise UnsupportedCallError(first.refusal)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        one = args[0]
        copied = func is torch.ops.aten.copy_.default and isinstance(one, FrozenWeight) and not one.is_meta
        if copied and one.shape == args[1].shape and torch.equal(one, args[1].to(one)):
            return one  # load_state_dict of a whole checkpoint
        if func in _COPIED or (func is _CONVERTED and (one.is_meta or kwargs.get("device") in (None, one.device))):
            return cls(one.shape, kwargs.get("dtype") or one.dtype, str(one.device), one.numbers, one.refusal, one.rows)
        for at, declared in enumerate(func._schema.arguments):
            value = args[at] if at < len(args) else kwargs.get(declared.name)
            if isinstance(value, FrozenWeight) and declared.alias_info is not None and declared.alias_info.is_write:
                raise UnsupportedCallError(value.refusal)
        args, kwargs = tree_map(_made, (args, kwargs))
        return func(*args, **kwargs)


def _made(value: Any) -> Any:
    return value.numbers().to(value.dtype) if isinstance(value, FrozenWeight) else value


def _one_row(index: Any) -> int | None:
    """The row that ``weight[index]`` means, if it is ``weight[row]`` or ``weight[row, :]``."""
    if isinstance(index, tuple) and len(index) == 2 and index[1] == slice(None):
        index = index[0]
    return index if type(index) is int and index >= 0 else None


def _looked_up(rows: Rows, ids: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
    """[..., dim] in ``weight``'s dtype. Raises IndexError for an id outside the vocabulary."""
    refuse_transforms()
    num, dim = weight.shape
    if ids.numel() == 1 and 0 <= (token := int(ids)) < num:
        return rows([token]).to(weight.dtype).view(*ids.shape, dim)
    different, place = torch.unique(ids, return_inverse=True)
    if different.numel() and not 0 <= int(different[0]) <= int(different[-1]) < num:
        raise IndexError(f"token ids must be in 0..{num - 1}, not {int(different[0])}..{int(different[-1])}")
    return rows(different.tolist()).to(weight.dtype)[place.reshape(-1)].view(*ids.shape, dim)


def freeze_experts(experts: nn.Module, patcher: Patcher) -> None:
    """Replace the parameters of ``experts``, which are on the meta device, by some that say why they cannot be used or changed."""
    names = [name for name, value in experts._parameters.items() if value is not None]
    for name in names:
        value: Any = experts._parameters[name]
        patcher.replace(experts, name, FrozenWeight(value.shape, value.dtype, "meta", _no_numbers, _EXPERTS))

    def leave_out(state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any) -> None:
        """For load_state_dict, which people use for whole checkpoints when they mean what was trained of them."""
        given = [name for name in names if prefix + name in state_dict]
        missing += [prefix + name for name in names if name not in given]
        if given:
            _log.warning("load_state_dict left %s as the store has it: %s", prefix.rstrip("."), _EXPERTS)

    patcher.replace(experts, "_load_from_state_dict", leave_out)


def _no_numbers() -> torch.Tensor:
    raise UnsupportedCallError(_EXPERTS)
