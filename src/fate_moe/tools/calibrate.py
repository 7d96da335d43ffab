"""Calibration of quantization on a text: the inputs of the experts, and the error that fewer bits cause in each layer."""

from __future__ import annotations

import gc
import hashlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fate_moe.adapter.meta_model import build_meta_model
from fate_moe.config import OffloadConfig
from fate_moe.core import ExpertId
from fate_moe.engine.load import build
from fate_moe.engine.prepare import Prepared, prepare
from fate_moe.kernels.reference import expert_mlp, expert_weights
from fate_moe.memory.precision import FixedView
from fate_moe.quant.blob import encode, views
from fate_moe.quant.solver import DEFAULT_SOLVER, SOLVERS
from fate_moe.store.format import blob_layout
from fate_moe.store.reader import DiskSource
from fate_moe.tools.evaluate import perplexity, windows

__all__ = ["Calibration", "calibrate", "measure_errors", "measure_view_losses"]

# Every expert's moments also include some of the layer's other tokens: how many, and their total weight relative to the expert's
# own tokens. The weight was chosen by the error of the experts' outputs on another text (upcycled model).
NUM_OTHER_TOKENS, OTHER_TOKENS_WEIGHT = 512, 0.1


class LayerInputs(NamedTuple):
    """Inputs of a layer's experts: hidden states [num_tokens, hidden], chosen experts and routing weights [num_tokens, top_k]."""

    hidden: Tensor
    chosen: Tensor
    routing_weights: Tensor


class Calibration:
    """The inputs of every MoE layer on a text, in memory: num_tokens x hidden numbers a layer. ``digest`` identifies the text."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.inputs: list[LayerInputs] = []  # by layer
        self.residual_power: list[float] = []  # by layer: the squared residual stream, summed over the text
        self._experts: list[Any] = []

    def moments(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Second moments fp32 [in, in] of the inputs of expert ``expert`` with parameters ``tensors``, by matrix.

        Tokens are weighted by their squared routing weight. Some of the layer's other tokens are added with a small weight, so that
        directions that do not occur in the expert's tokens are not treated as absent.
        """
        inputs, experts = self.inputs[layer], self._experts[layer]
        token, choice = (inputs.chosen == expert).nonzero(as_tuple=True)
        others = torch.arange(0, len(inputs.hidden), max(1, len(inputs.hidden) // NUM_OTHER_TOKENS))
        typical = float(inputs.routing_weights.float().square().mean().sqrt())
        ratio = OTHER_TOKENS_WEIGHT * max(1, len(token)) / len(others)
        others_factor = torch.full((len(others),), typical * ratio**0.5)
        factor = torch.cat([inputs.routing_weights[token, choice].float(), others_factor])[:, None]
        x = inputs.hidden[torch.cat([token, others])]
        with torch.inference_mode():
            by_matrix = dict(zip(_matrices(experts), (x, _inner(experts, tensors, x)), strict=True))
            scaled = {name: value.float() * factor for name, value in by_matrix.items()}
            return {name: value.T @ value for name, value in scaled.items()}


def calibrate(
    path: Path, tokens: Tensor, *, window: int = 512, advance: Callable[[int], None] = lambda num_tokens: None
) -> Calibration:
    """Run the lossless store at ``path`` on ``tokens`` [num_tokens] int64 and record the inputs of its experts.

    ``advance`` is called with the number of further tokens done.
    """
    calibration = Calibration(hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16])
    prepared = prepare(path)
    config = OffloadConfig(context_length=window, preset="load-on-demand")
    model = build(prepared, prepared.plan(config), config)
    with closing(model.fate), torch.inference_mode():
        observer = _Observer(prepared, model)
        for span in windows(len(tokens), window, window - 1):
            model(tokens[None, span.start : span.end], use_cache=False, logits_to_keep=1)
            advance(span.end - span.scored)
    calibration.inputs = [LayerInputs(*map(torch.cat, zip(*passes, strict=True))) for passes in observer.inputs]
    calibration.residual_power = observer.residual_power
    names = [stack.name for stack in prepared.stacks]
    del model, observer, prepared
    gc.collect()  # a model refers to itself
    bare = build_meta_model(path)  # its experts modules reference neither the runtime nor the weights
    calibration._experts = [bare.get_submodule(name) for name in names]
    return calibration


def measure_errors(
    path: Path,
    calibration: Calibration,
    precisions: Sequence[str],
    group_size: int = 64,
    advance: Callable[[int], None] = lambda num_layers: None,
) -> list[dict[str, float]]:
    """By layer and precision: the squared error of the experts' summed outputs, relative to the squared residual stream.

    ``path`` is the lossless store that ``calibration`` was recorded on. Every expert is read once and quantized in each precision.
    ``advance`` is called with the number of further layers done.
    """
    prepared = prepare(path)
    manifest, relative_errors = prepared.store.manifest, []
    memory = mmap.mmap(-1, manifest.slot_bytes)
    with closing(DiskSource(prepared.store)) as source, torch.inference_mode():
        for stack in prepared.stacks:
            inputs, experts, shapes = calibration.inputs[stack.layer], calibration._experts[stack.layer], stack.output_rows_first()
            layouts = {name: blob_layout(name, shapes, manifest.dtype, group_size) for name in precisions}
            errors = {name: torch.zeros(inputs.hidden.shape, dtype=torch.float32) for name in precisions}
            for expert in range(stack.num_experts):
                token, choice = (inputs.chosen == expert).nonzero(as_tuple=True)
                if not len(token):
                    continue
                layout, x = manifest.layout_of(ExpertId(stack.layer, expert)), inputs.hidden[token]
                source.read(ExpertId(stack.layer, expert), memoryview(memory))
                parts = views(layout, torch.frombuffer(memory, dtype=torch.uint8)[: layout.length])
                weights = expert_weights(layout, parts, shapes, x.dtype)
                exact = expert_mlp(experts, weights, x).float()
                moments = calibration.moments(stack.layer, expert, weights)
                for name, error in errors.items():
                    blob = torch.frombuffer(encode(layouts[name], weights, SOLVERS[DEFAULT_SOLVER], moments), dtype=torch.uint8)
                    quantized = expert_weights(layouts[name], views(layouts[name], blob), shapes, x.dtype)
                    routing_weights = inputs.routing_weights[token, choice].float()[:, None]
                    error.index_add_(0, token, (expert_mlp(experts, quantized, x).float() - exact) * routing_weights)
            power = calibration.residual_power[stack.layer] or 1.0
            relative_errors.append({name: float(error.square().sum()) / power for name, error in errors.items()})
            advance(1)
    return relative_errors


def measure_view_losses(
    path: Path, tokens: Tensor, *, window: int = 512, advance: Callable[[int], None] = lambda num_tokens: None
) -> dict[int, float]:
    """The loss, in nats per token of ``tokens`` [num_tokens] int64, of reading every expert as a shorter view, by bits of the view.

    {} if no expert of the store at ``path`` has shorter views. Precision policies choose views by these losses.
    """
    prepared = prepare(path)
    layouts = {
        layout for layer in range(prepared.store.manifest.num_layers) for layout in prepared.store.manifest.layouts_of(layer)
    }
    widths = max((layout.plane_widths for layout in layouts), key=len)
    views = list(accumulate(widths))
    losses = {}
    for bits in views if len(views) > 1 else ():
        prepared = prepare(path)
        config = OffloadConfig(context_length=window, preset="load-on-demand", precision_policy="routing-weighted")
        model = build(prepared, prepared.plan(config), config)
        model.fate.runtime.view_selector.policy = FixedView(bits)
        with closing(model.fate):
            losses[bits] = perplexity(model, tokens, window=window, advance=advance).loss
        del model, prepared
        gc.collect()  # a model refers to itself
    return {bits: losses[bits] - losses[views[-1]] for bits in views[:-1] if losses}


class _Observer:
    """Takes the place of the runtime: records the inputs of each call and passes the call on."""

    def __init__(self, prepared: Prepared, model: Any) -> None:
        """From now on every layer's experts call the observer, and every decoder layer's input is measured."""
        self.inputs: list[list[LayerInputs]] = [[] for _ in prepared.stacks]
        self.residual_power = [0.0] * len(prepared.stacks)
        self._runtime = model.fate.runtime
        patches = model.fate.patches
        for stack in prepared.stacks:
            patches.replace(model.get_submodule(stack.name), "fate_runtime", self)
            decoder_layer = model.get_submodule(stack.block.rpartition(".")[0])
            patches.hook(decoder_layer, "before", self._power_hook(stack.layer), with_kwargs=True)

    def compute(self, layer: int, experts: Any, hidden: Tensor, index: Tensor, routing_weights: Tensor) -> Tensor:
        """The runtime's result."""
        self.inputs[layer].append(LayerInputs(hidden.clone(), index.clone(), routing_weights.reshape(index.shape).clone()))
        output: Tensor = self._runtime.compute(layer, experts, hidden, index, routing_weights)
        return output

    def _power_hook(self, layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            self.residual_power[layer] += float(stream.float().square().sum())

        return hook


def _matrices(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _inner(experts: Any, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The input of the expert's down_proj for the inputs ``x``."""
    first = _matrices(experts)[0]
    bias = tensors.get(f"{first}_bias")
    inner = linear(x, tensors[first].to(x.dtype), None if bias is None else bias.to(x.dtype))
    return experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)  # type: ignore[no-any-return]
