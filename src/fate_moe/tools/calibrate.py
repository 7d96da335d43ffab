"""What a text tells about a model's experts: what they are fed, and what fewer bits would cost each layer."""

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

__all__ = ["Calibration", "calibrate", "measure_harm", "measure_views"]

# Tokens of the layer, whoever has them, that every expert's moments hear as well, and what all of them weigh of all its own.
# Upcycled model, error of the experts' outputs on another text: 0.0915 at 0.02, 0.0910 at 0.1, 0.0918 at 0.5, 0.0948 at 2.
OTHERS, WEIGHT_OF_OTHERS = 512, 0.1


class Fed(NamedTuple):
    """What one layer's experts were given: inputs [num_tokens, hidden], chosen experts [num_tokens, top_k] and their weights."""

    hidden: Tensor
    chosen: Tensor
    gate: Tensor


class Calibration:
    """Every MoE layer's inputs on a text (tokens x hidden numbers a layer in memory); ``digest`` tells texts apart."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.fed: list[Fed] = []
        self.residual: list[float] = []  # by layer: the residual stream's square, summed over the text
        self._experts: list[Any] = []

    def moments(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Second moments fp32 [in, in], by matrix, of what expert ``expert`` with parameters ``tensors`` is fed.

        Tokens count by their squared gate weight; some of the layer's other tokens count a little, so that directions that this
        text never sent to the expert are not taken for empty.
        """
        fed, experts = self.fed[layer], self._experts[layer]
        token, choice = (fed.chosen == expert).nonzero(as_tuple=True)
        others = torch.arange(0, len(fed.hidden), max(1, len(fed.hidden) // OTHERS))
        usual = float(fed.gate.float().square().mean().sqrt())
        share = WEIGHT_OF_OTHERS * max(1, len(token)) / len(others)
        factor = torch.cat([fed.gate[token, choice].float(), torch.full((len(others),), usual * share**0.5)])[:, None]
        x = fed.hidden[torch.cat([token, others])]
        with torch.inference_mode():
            inputs = dict(zip(_matrices(experts), (x, _inner(experts, tensors, x)), strict=True))
            scaled = {name: value.float() * factor for name, value in inputs.items()}
            return {name: value.T @ value for name, value in scaled.items()}


def calibrate(
    path: Path, tokens: Tensor, *, window: int = 512, advance: Callable[[int], None] = lambda num_tokens: None
) -> Calibration:
    """Run the lossless store at ``path`` on ``tokens`` [num_tokens] int64 and keep what its experts are fed."""
    found = Calibration(hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16])
    prepared = prepare(path)
    config = OffloadConfig(context_length=window, preset="load-on-demand")
    model = build(prepared, prepared.plan(config), config)
    with closing(model.fate), torch.inference_mode():
        observer = _Observer(prepared, model)
        for span in windows(len(tokens), window, window - 1):
            model(tokens[None, span.start : span.end], use_cache=False, logits_to_keep=1)
            advance(span.end - span.scored)
    found.fed = [Fed(*map(torch.cat, zip(*of_layer, strict=True))) for of_layer in observer.fed]
    found.residual = observer.residual
    names = [stack.name for stack in prepared.stacks]
    del model, observer, prepared
    gc.collect()  # a model refers to itself
    bare = build_meta_model(path)  # experts that hold on to nothing else
    found._experts = [bare.get_submodule(name) for name in names]
    return found


def measure_harm(
    path: Path,
    found: Calibration,
    precisions: Sequence[str],
    group_size: int = 64,
    advance: Callable[[int], None] = lambda num_layers: None,
) -> list[dict[str, float]]:
    """By layer and precision: the squared error of the layer's experts' summed outputs over the residual stream's square.

    ``path`` is the lossless store that ``found`` was measured on. Reads every expert once, and quantizes it for each precision.
    """
    prepared = prepare(path)
    manifest, harm = prepared.store.manifest, []
    memory = mmap.mmap(-1, manifest.slot_bytes)
    with closing(DiskSource(prepared.store)) as source, torch.inference_mode():
        for stack in prepared.stacks:
            fed, experts, shapes = found.fed[stack.layer], found._experts[stack.layer], stack.output_rows_first()
            made = {name: blob_layout(name, shapes, manifest.dtype, group_size) for name in precisions}
            errors = {name: torch.zeros(fed.hidden.shape, dtype=torch.float32) for name in precisions}
            for expert in range(stack.num_experts):
                token, choice = (fed.chosen == expert).nonzero(as_tuple=True)
                if not len(token):
                    continue
                layout, x = manifest.layout_of(ExpertId(stack.layer, expert)), fed.hidden[token]
                source.read(ExpertId(stack.layer, expert), memoryview(memory))
                parts = views(layout, torch.frombuffer(memory, dtype=torch.uint8)[: layout.length])
                weights = expert_weights(layout, parts, shapes, x.dtype)
                exact = expert_mlp(experts, weights, x).float()
                moments = found.moments(stack.layer, expert, weights)
                for name, error in errors.items():
                    blob = torch.frombuffer(encode(made[name], weights, SOLVERS[DEFAULT_SOLVER], moments), dtype=torch.uint8)
                    fewer = expert_weights(made[name], views(made[name], blob), shapes, x.dtype)
                    gate = fed.gate[token, choice].float()[:, None]
                    error.index_add_(0, token, (expert_mlp(experts, fewer, x).float() - exact) * gate)
            residual = found.residual[stack.layer] or 1.0
            harm.append({name: float(error.square().sum()) / residual for name, error in errors.items()})
            advance(1)
    return harm


def measure_views(
    path: Path, tokens: Tensor, *, window: int = 512, advance: Callable[[int], None] = lambda num_tokens: None
) -> dict[int, float]:
    """Nats per token of ``tokens`` [num_tokens] int64 that the store at ``path`` loses with every expert read as each shorter view.

    Empty where no expert has shorter views. Policies choose by this what they may read.
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
    """Stands where the runtime stands: passes each call on and keeps what it was given."""

    def __init__(self, prepared: Prepared, model: Any) -> None:
        """Every layer's experts call the observer from now on, and every decoder layer's input is measured."""
        self.fed: list[list[Fed]] = [[] for _ in prepared.stacks]
        self.residual = [0.0] * len(prepared.stacks)
        self._runtime = model.fate.runtime
        patches = model.fate.patches
        for stack in prepared.stacks:
            patches.replace(model.get_submodule(stack.name), "fate_runtime", self)
            decoder_layer = model.get_submodule(stack.block.rpartition(".")[0])
            patches.hook(decoder_layer, "before", self._measuring(stack.layer), with_kwargs=True)

    def compute(self, layer: int, experts: Any, hidden: Tensor, index: Tensor, routing_weights: Tensor) -> Tensor:
        """The runtime's own answer."""
        self.fed[layer].append(Fed(hidden.clone(), index.clone(), routing_weights.reshape(index.shape).clone()))
        answer: Tensor = self._runtime.compute(layer, experts, hidden, index, routing_weights)
        return answer

    def _measuring(self, layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            self.residual[layer] += float(stream.float().square().sum())

        return hook


def _matrices(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _inner(experts: Any, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the expert's last matrix is given for the inputs ``x``."""
    into = _matrices(experts)[0]
    bias = tensors.get(f"{into}_bias")
    inner = linear(x, tensors[into].to(x.dtype), None if bias is None else bias.to(x.dtype))
    return experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)  # type: ignore[no-any-return]
