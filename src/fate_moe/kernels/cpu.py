"""The experts in an arena's slots, computed on the CPU: by the C++ kernels where they can, else by the plain torch twins."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fate_moe.core import BlobLayout
from fate_moe.kernels.activations import find_activation
from fate_moe.kernels.native import BF16, DTYPES, matrix_place, native, why_not
from fate_moe.kernels.reference import expert_mlp, expert_weights
from fate_moe.quant.blob import views

__all__ = ["SMALL", "SlotExperts", "layer_kernel"]

_log = logging.getLogger(__name__)

# Without int8 activations, up to this many tokens an expert's rows are multiplied as they lie; more pay for torch's GEMM, and for
# writing quantized weights out as numbers before it.
MOST_TOKENS = 8
# Unquantized matrices up to so many weights are multiplied by the extension for any number of rows: oneDNN is slow on small ones.
SMALL = 1 << 20

Ready = Sequence[tuple[int, int]]  # (expert's index in its layer, slot)


class SlotExperts:
    """Runs experts on their tokens straight from the slots' bytes. One thread at a time.

    One call of the extension for all ready experts, with int8 activations in groups as wide as the weights': the same bits for one
    token and for many. With fp32 activations (``exact``, or weights that are not quantized) many tokens of an expert go through
    torch's GEMM. An output depends on its own token alone, not on the others in the call.
    """

    def __init__(
        self,
        memory: Any,
        offsets: Sequence[int],
        layouts: Sequence[Sequence[BlobLayout]],
        shapes: Sequence[dict[str, tuple[int, ...]]],
        *,
        exact: bool = False,
    ) -> None:
        """``memory`` has the slots, ``offsets`` where each begins; ``layouts`` by layer and expert, ``shapes`` (parameter
        name to [out, in] or [out]) by layer."""
        if (reason := why_not()) is not None:
            _warn_once(reason)  # now, not in the middle of a text
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._offsets = offsets
        self._addresses = [self._memory.data_ptr() + offset for offset in offsets]
        self._layouts = layouts
        self._shapes = shapes
        self._exact = exact
        self._kernels: dict[int, tuple[_LayerKernel | None, ...]] = {}  # by expert
        self._gates: dict[int, Any] = {}  # what the layers' kernels take for the activation
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}  # making them costs 10 us a part, so they are kept

    def outputs(self, layer: int, experts: Any, hidden: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Zeros [num_rows, hidden] for ``run`` to write to, by (token, choice): fp32 for kernels, else the model's dtype."""
        dtype = torch.float32 if any(self._kernels_of(layer, experts)) and hidden.dtype in DTYPES else hidden.dtype
        return torch.zeros(num_rows, hidden.shape[1], dtype=dtype)

    def run(
        self,
        layer: int,
        experts: Any,
        ready: Ready,
        rows: Mapping[int, Sequence[int]],
        hidden: torch.Tensor,
        outputs: torch.Tensor,
        num_planes: Mapping[int, int | None] | None = None,
    ) -> None:
        """Write the outputs of the ``ready`` experts of ``layer``, before the routing weight.

        ``hidden`` is [num_tokens, hidden], ``rows[expert]`` the (token, choice) rows of ``outputs`` that chose it, a multiple of
        num_tokens of them in all. ``num_planes[expert]`` computes a shorter view of an expert (1: 2 bits, 2: 3 bits); it needs no
        more of the blob than that. ``experts`` is the transformers module.
        """
        kernels = self._kernels_of(layer, experts)
        if self._gates[layer] != _gate(experts) or any(
            part._forward_hooks or part._forward_pre_hooks for part in experts.children()
        ):
            kernels = (None,) * len(kernels)  # somebody changed or watches the activation since
        top_k = len(outputs) // len(hidden)
        planes = num_planes or {}
        by_kernel: dict[_LayerKernel, list[tuple[int, int]]] = {}  # one, unless a layer has several precisions
        others = []
        for expert, slot in ready:
            kernel, many = kernels[expert], len(rows[expert]) > MOST_TOKENS
            if (
                kernel is None
                or kernel.whole is None
                or hidden.dtype not in DTYPES
                or (many and (self._exact or kernel.num_planes == BF16))
            ):
                others.append((expert, slot))
            else:
                by_kernel.setdefault(kernel, []).append((expert, slot))
        for kernel, items in by_kernel.items():
            self._fused(kernel, items, rows, hidden, outputs, top_k, planes)
        for expert, slot in others:
            chosen = torch.tensor(rows[expert])
            x = hidden if len(hidden) == 1 else hidden[chosen // top_k]
            weights = self._weights(layer, expert, slot, hidden.dtype, kernels[expert], planes.get(expert))
            outputs[chosen] = expert_mlp(experts, weights, x).to(outputs.dtype)

    def gradients(
        self,
        layer: int,
        experts: Any,
        expert: int,
        slot: int,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        num_planes: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What one expert gives back: [n, hidden] with respect to the rows of ``hidden`` [num_tokens, hidden] at ``tokens`` [n],
        and [n] to its routing ``weights`` [n], from the ``gradient`` [num_tokens, hidden] of the weighted sum.

        The gradient is that of the numbers of its weights (``num_planes`` as in ``run``) in the dtype of ``hidden``.
        """
        numbers = self._weights(layer, expert, slot, hidden.dtype, self._kernels_of(layer, experts)[expert], num_planes)
        x, of_sum = hidden[tokens].detach().requires_grad_(), gradient[tokens]
        with torch.enable_grad():
            y = expert_mlp(experts, numbers, x)
        (of_x,) = torch.autograd.grad(y, x, (of_sum * weights.unsqueeze(1)).to(y.dtype))
        return of_x, (y.detach().float() * of_sum.float()).sum(1).to(weights.dtype)

    def has_fused(self, layer: int, experts: Any) -> bool:
        """Whether all experts of ``layer`` have a fused kernel; ``experts`` is the transformers module."""
        return all(kernel is not None and kernel.whole is not None for kernel in set(self._kernels_of(layer, experts)))

    def takes_many(self, layer: int, experts: Any) -> bool:
        """Whether kernels are the way for any number of tokens: experts that are quantized, or small."""
        small = all(math.prod(shape) <= SMALL for shape in self._shapes[layer].values())
        return not self._exact and all(small or of.num_planes != BF16 for of in self._kernels_of(layer, experts) if of is not None)

    def fused(self, layer: int, experts: Any) -> tuple[list[Any], list[int], list[int]]:
        """Of a layer with ``has_fused``: the extension's places of its experts, one for each precision; how many planes each has;
        and each expert's place."""
        kernels = self._kernels_of(layer, experts)
        different = list(dict.fromkeys(kernels))
        found = [kernel for kernel in different if kernel is not None]
        return (
            [kernel.whole for kernel in found],
            [kernel.num_planes for kernel in found],
            [different.index(one) for one in kernels],
        )

    def combine(self, outputs: torch.Tensor, routing_weights: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] in ``hidden``'s dtype: the rows of ``outputs`` times ``routing_weights`` [num_tokens, top_k], summed
        in routing order."""
        num_tokens, top_k = routing_weights.shape
        if outputs.dtype != torch.float32 or native is None or hidden.dtype not in (torch.float32, torch.bfloat16):
            return (outputs.view(num_tokens, top_k, -1) * routing_weights.unsqueeze(2)).sum(1).to(hidden.dtype)
        if routing_weights.dtype not in DTYPES or not routing_weights.is_contiguous():
            routing_weights = routing_weights.float().contiguous()
        out = torch.empty(num_tokens, outputs.shape[1], dtype=hidden.dtype)
        native.combine(
            outputs.data_ptr(),
            routing_weights.data_ptr(),
            DTYPES[routing_weights.dtype],
            num_tokens,
            top_k,
            outputs.shape[1],
            out.data_ptr(),
            DTYPES[out.dtype],
            torch.get_num_threads(),
        )
        return out

    def _fused(
        self,
        kernel: _LayerKernel,
        ready: Ready,
        rows: Mapping[int, Sequence[int]],
        hidden: torch.Tensor,
        outputs: torch.Tensor,
        top_k: int,
        planes: Mapping[int, int | None],
    ) -> None:
        hidden = hidden.contiguous()
        starts: list[int] = [0]
        choices: list[int] = []
        for expert, _ in ready:
            choices += rows[expert]
            starts.append(len(choices))
        addresses = [self._addresses[slot] for _, slot in ready]
        counts = [planes.get(expert) or kernel.num_planes for expert, _ in ready]
        where, dtype = (addresses, counts, starts, choices, hidden.data_ptr()), DTYPES[hidden.dtype]
        native.experts(kernel.whole, *where, dtype, len(hidden), top_k, outputs.data_ptr(), self._exact, torch.get_num_threads())

    def _weights(
        self, layer: int, expert: int, slot: int, dtype: torch.dtype, kernel: _LayerKernel | None, num_planes: int | None
    ) -> dict[str, torch.Tensor]:
        """One expert's parameters in ``dtype``; quantized ones are made anew, by the extension where it can."""
        layout = self._layouts[layer][expert]
        parts = self._views.get((id(layout), slot))
        if parts is None:
            start = self._offsets[slot]
            parts = self._views[id(layout), slot] = views(layout, self._memory[start : start + layout.length])
        if kernel is None or not layout.plane_widths or dtype not in (torch.float32, torch.bfloat16):
            return expert_weights(layout, parts, self._shapes[layer], dtype, num_planes)
        weights = {}
        for name, shape in self._shapes[layer].items():
            if name in parts:
                weights[name] = parts[name].to(dtype)
                continue
            weights[name] = torch.empty(shape, dtype=dtype)
            native.expand(
                kernel.places[name],
                self._addresses[slot],
                num_planes or kernel.num_planes,
                weights[name].data_ptr(),
                DTYPES[dtype],
                torch.get_num_threads(),
            )
        return weights

    def _kernels_of(self, layer: int, experts: Any) -> tuple[_LayerKernel | None, ...]:
        if layer not in self._kernels:
            layouts = self._layouts[layer]
            made = {layout: layer_kernel(layout, self._shapes[layer], experts) for layout in dict.fromkeys(layouts)}
            for found in made.values():
                if isinstance(found, str):
                    _warn_once(found)
            self._gates[layer] = _gate(experts)
            self._kernels[layer] = tuple(None if isinstance(found := made[layout], str) else found for layout in layouts)
        return self._kernels[layer]


class _LayerKernel:
    """What the extension needs to know of one layer: ``places`` of its matrices, and ``whole``, the fused expert (None: its gate
    has no kernel, so matrices are written out and multiplied by torch)."""

    def __init__(self, places: dict[str, Any], whole: Any, num_planes: int) -> None:
        self.places = places
        self.whole = whole
        self.num_planes = num_planes


def layer_kernel(layout: BlobLayout, shapes: dict[str, tuple[int, ...]], experts: Any) -> _LayerKernel | str:
    """The extension's kernel for experts of ``layout`` and ``shapes``, or why it has none; ``experts`` is the transformers
    module."""
    if (reason := why_not()) is not None:
        return reason
    places = {}
    for name, shape in shapes.items():
        if not name.endswith("_bias"):
            place = matrix_place(layout, name, shape, f"{name}_bias")
            if isinstance(place, str):
                return place
            places[name] = place
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    gate = find_activation(experts) if {up, "down_proj"} == set(places) else None
    whole = native.ExpertPlace.make(places[up], places["down_proj"], gate) if gate is not None else None
    return _LayerKernel(places, whole, len(layout.plane_widths) or BF16)


def _gate(experts: Any) -> tuple[Any, ...]:
    """What makes the activation of ``experts`` what it is."""
    settings = ("act_fn", "alpha", "limit", "swiglu_alpha", "swiglu_limit")
    return getattr(type(experts), "_apply_gate", None), *(getattr(experts, name, None) for name in settings)


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        _log.warning("experts run on torch: %s", reason)
