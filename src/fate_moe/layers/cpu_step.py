"""Tokens of one sequence or several through one plain decoder layer in one call of the extension (csrc/step.h). A token's bits
depend on its own sequence alone.

``plain.py`` says which layers these are, and the family's own forward stays for all other calls. ``model_step.py`` runs all layers
of a model in one call where it knows what is around them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from fate_moe.adapter.kv_cache import make_room, room_for, state_for
from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.core import Patcher
from fate_moe.kernels.native import BF16, DTYPES, native
from fate_moe.kernels.plain_layer import Delta, PlainLayer, Router
from fate_moe.kernels.routing import SCORES
from fate_moe.layers.attentions import (
    angles_for,
    cos_and_sin,
    embeddings_of,
    mask_for,
    native_attention,
    projections_of,
    takes_tokens,
)
from fate_moe.layers.modules import accelerated_by, matrices_of
from fate_moe.layers.plain import NotPlain, plain_decoder
from fate_moe.layers.reasons import cpu_reasons
from fate_moe.layers.rows import Masks, batch_rows, contiguous_kv, forgotten_kv, state_kv
from fate_moe.layers.snapshot import ModuleSnapshot, StandIn
from fate_moe.layers.weights import native_norm, router_weight, takes_many, warn_of_difference, weight_of
from fate_moe.runtime import ExpertRuntime

__all__ = ["CpuStep", "join_layers"]

_log = logging.getLogger(__name__)

_PROBE_TOKENS = 6
_NEAR = 0.04  # of the norm of what the layer adds; a missing factor or another order of steps makes more than 0.1
_TRIES = 3  # a token whose k-th and next expert are nearly equal may be routed otherwise: no proof against a layer


@torch.no_grad()
def join_layers(
    model: Any, stacks: Sequence[ExpertStack], runtime: ExpertRuntime, exact: bool, kv_format: str, patcher: Patcher
) -> list[CpuStep]:
    """Let the plain layers among those of ``stacks`` run so; which do. Comes after ``accelerate``, whose kernels they use.

    ``exact``: quantized weights are multiplied with fp32 activations. ``kv_format``: of the KV caches that are made. Why a layer is
    left as it is, is logged.
    """
    shared = Shared(runtime, exact, kv_format, Masks())
    generator, steps = torch.Generator().manual_seed(0), list[CpuStep]()
    by_layer = {stack.layer: stack for stack in stacks}
    for plain in plain_decoder(model):
        stack = by_layer.get(plain.layer)
        if isinstance(plain, NotPlain):
            reasons: Sequence[str] = plain.reasons
        else:
            reasons = cpu_reasons(plain, model.dtype) or _missing_kernels(model, plain, stack, runtime)
        if reasons or isinstance(plain, NotPlain):
            _log.info("%s runs its own forward: %s", plain.path, "; ".join(reasons))
            continue
        step = CpuStep(model, plain, stack, shared)
        if (difference := _difference(step, generator)) is not None:
            warn_of_difference(plain.path, difference)
            continue
        patcher.replace(model.get_submodule(plain.path), "forward", step)
        steps.append(step)

    def before(module: nn.Module, args: Any) -> None:
        for step in steps:  # all at once: between two kernels each check would find its data out of the caches
            step.ready = step.is_unchanged()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for step in steps:
            step.ready = False
        shared.masks.forget()

    if steps:
        decoder = model.get_submodule(steps[0].plain.path.rpartition(".")[0].rpartition(".")[0])
        patcher.hook(decoder, "before", before)
        patcher.hook(decoder, "after", after)
    return steps


def _missing_kernels(model: Any, plain: PlainLayer, stack: ExpertStack | None, runtime: ExpertRuntime) -> list[str]:
    """The parts of a plain layer that the extension cannot run as their weights are."""
    layer = model.get_submodule(plain.path)
    block = layer.get_submodule(plain.block)
    reasons = []
    parts = {"input_layernorm": layer, "post_attention_layernorm": layer}
    if plain.shared is not None:
        parts[plain.shared.name] = layer if plain.shared.of_layer else block
    if plain.block_norm is not None:
        parts[plain.block_norm[0]] = block
    for name, owner in parts.items():
        if accelerated_by(owner.get_submodule(name)) is None:
            reasons.append(f"no kernel runs its {name}")
    if _attention_of(layer, plain) is None:
        reasons.append(f"no kernel runs its {plain.attention_name}")
    if plain.shared is not None and plain.shared.gate and weight_of(block.get_submodule(plain.shared.gate)) is None:
        reasons.append(f"no kernel multiplies the weight of its {plain.shared.gate}")
    if stack is None:
        return reasons
    if router_weight(block.get_submodule(plain.router_name)) is None:
        reasons.append(f"no kernel multiplies the weight of its {plain.router_name}")
    if plain.router.correction and _tensor(block, plain.router.correction).dtype not in DTYPES:
        reasons.append(f"no kernel reads its {plain.router.correction}")
    if not runtime.has_fused(stack.layer, block.experts):
        reasons.append("no kernel runs its experts")
    return reasons


def _attention_of(layer: Any, plain: PlainLayer) -> Any:
    """The extension's Attention of ``layer``'s; None if there is no kernel."""
    module = layer.get_submodule(plain.attention_name)
    return accelerated_by(module) if plain.attention.delta is None else native_attention(module, plain.attention)


def _tensor(block: torch.nn.Module, path: str) -> torch.Tensor:
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


def _native_router(block: torch.nn.Module, router: Router) -> Any:
    correction = _tensor(block, router.correction) if router.correction else None
    at, dtype = (correction.data_ptr(), DTYPES[correction.dtype]) if correction is not None else (0, 0)
    return native.Router.make(
        router.top_k, SCORES.index(router.scores), router.normalize, router.floor, router.scale, at, dtype, router.groups,
        router.top_groups, router.group_best, router.spread, router.rounds_logits, router.rounds_weights,
    )  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """What all steps of a model have in common. ``exact``: quantized weights are multiplied with fp32 activations."""

    runtime: ExpertRuntime
    exact: bool
    kv_format: str
    masks: Masks

    def run(
        self,
        step: Any,
        x: int,
        spans: Any,
        angles: Sequence[torch.Tensor],
        kv: Sequence[int],
        wanted: list[int],
        logits: int,
        depths: Sequence[int] = (),
    ) -> None:
        """Run the extension's ``step`` on the rows at ``x``, which become those after it; csrc/step.h has the rest."""
        team = not self.runtime.is_watched  # Python in between may want threads of its own
        native.step(
            step, x, spans, [of.data_ptr() for of in angles], kv, wanted, depths, logits, self.runtime.memory, self.exact, team,
            torch.get_num_threads(),
        )  # fmt: skip


class CpuStep(StandIn):
    """A plain layer's forward: tokens of sequences in one call, else the layer's own."""

    def __init__(self, model: Any, plain: PlainLayer, stack: ExpertStack | None, shared: Shared) -> None:
        """A dense layer has no ``stack``."""
        layer, self.config = model.get_submodule(plain.path), model.config
        self.block = layer.get_submodule(plain.block)
        self.original, self.shared = layer.forward, shared
        self.experts = self.block.experts if stack is not None else None
        self.plain, self.index, self.hidden = plain, plain.attention.index, plain.hidden
        self.post_norm = layer.post_attention_layernorm
        owner = layer if plain.shared is not None and plain.shared.of_layer else self.block
        beside = owner.get_submodule(plain.shared.name) if plain.shared is not None else None
        mixer = layer.get_submodule(plain.attention_name)
        projections = projections_of(mixer)
        if beside is not None:
            projections += matrices_of(beside)
        self.takes_many = takes_many(projections, shared.exact)
        inner = [mixer, *([beside] if beside is not None else [])]
        router = gate = native.Weight.make(native.Place.make(BF16, 0, self.hidden, [0], 0, 0, -1, 0), 0, 0, 0)  # none
        places: tuple[Any, ...] = [], [], []
        if stack is not None:
            of_router = [".".join(plain.router_name.split(".")[: 1 + depth]) for depth in range(plain.router_name.count(".") + 1)]
            inner += [self.experts, *map(self.block.get_submodule, of_router)]
            router, places = router_weight(inner[-1]), shared.runtime.fused(stack.layer, self.experts)
            self.takes_many = self.takes_many and shared.runtime.takes_many(stack.layer, self.experts)
        self.snapshot = ModuleSnapshot(list(dict.fromkeys([layer, self.block, *inner])))
        self.ready = True  # set for each pass of the decoder
        if plain.shared is not None and plain.shared.gate is not None:
            gate = weight_of(self.block.get_submodule(plain.shared.gate))
        norms = native_norm(layer.input_layernorm, plain.input_norm), native_norm(layer.post_attention_layernorm, plain.post_norm)
        routing = _native_router(self.block, plain.router)
        name, norm = plain.block_norm or ("", None)
        self.block_norm = native_norm(self.block.get_submodule(name), norm)
        self.attention = _attention_of(layer, plain)
        self.until_experts = native.Layer.make(*norms, self.attention, router, gate, routing, plain.residual_scale, self.block_norm)
        self.beside = accelerated_by(beside) if beside is not None else None
        self._places = places
        self.of = self.step_layer(0)
        self._alone = native.Step.make([self.of], None)

    def step_layer(self, angles: int) -> Any:
        """The extension's StepLayer, which turns by the pair of cos and sin number ``angles`` of a pass."""
        return native.StepLayer.make(self.plain.layer, self.until_experts, self.beside, *self._places, angles)

    def is_unchanged(self) -> bool:
        """Whether the layer is as it was found."""
        return self.snapshot.same()

    def is_watched(self) -> bool:
        """Whether somebody hooked a part since, or watches the experts' inputs (tools/calibrate.py)."""
        return self.snapshot.hooked() or (self.experts is not None and self.experts.fate_runtime is not self.shared.runtime)

    def room_in(self, cache: Any, batch: int) -> Any:
        """The layer's part of a KV cache of ``batch`` sequences; None if it is another kind."""
        attention = self.plain.attention
        if attention.delta is not None:
            return state_for(cache, self.index, state_shapes(attention.delta), batch)
        return room_for(cache, self.index, attention.kv_heads, attention.cached_dims, batch, self.shared.kv_format)

    def forgotten(self, batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for what ``count`` tokens of ``batch`` sequences leave, where nobody wants it."""
        attention = self.plain.attention
        if attention.delta is not None:
            inputs, states = state_shapes(attention.delta)
            return torch.zeros(batch, *inputs, dtype=torch.bfloat16), torch.zeros(batch, *states)
        keys, values = forgotten_kv(attention, batch, count, self.shared.kv_format)
        return keys, values

    def kv_of(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[int, ...]:
        """The extension's Kv of the buffers of this layer's part of a cache."""
        return (contiguous_kv if self.plain.attention.delta is None else state_kv)(keys, values)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x, attention = hidden_states, self.plain.attention
        angles = angles_for(attention, x, kwargs)
        cache, mask, shared = kwargs.get("past_key_values"), kwargs.get("attention_mask"), self.shared
        if (
            angles is None
            or args
            or not takes_tokens(x, angles, attention, self.takes_many)
            or not self.ready
            or self.is_watched()  # transformers adds hooks in the midst of a pass, to record outputs
        ):
            return self.original(hidden_states, *args, **kwargs)
        batch, count, _ = x.shape
        room = self.room_in(cache, batch)
        past = room.get_seq_length() if room is not None else 0
        padding = shared.masks.padding(mask, batch, count, past, attention.window) if room is not None or cache is None else None
        rows = batch_rows(batch, count, past, padding) if padding is not None else None
        if rows is None:
            return self.original(hidden_states, *args, **kwargs)
        states = room.reserve(count)[1:] if room is not None else self.forgotten(batch, count)
        out = rows.pick(x).clone()
        turned = tuple(rows.pick(of).float() for of in angles)
        shared.run(self._alone, out.data_ptr(), rows.spans, turned, self.kv_of(*states), [], 0)
        if room is not None:
            room.extend(count)
        return rows.put(out)


def state_shapes(delta: Delta) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of what a gated delta rule keeps of a sequence: bf16 inputs of its convolution, and fp32 states."""
    return (delta.channels, delta.kernel), (delta.value_heads, delta.key_dim, delta.value_dim)


class _Pretender:
    """A runtime whose experts give fixed rows, whatever they are given."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows  # [num_experts, hidden]

    def compute(self, layer: int, experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (self.rows[index] * weights.float().unsqueeze(-1)).sum(1).to(hidden.dtype)


def _difference(step: CpuStep, generator: torch.Generator) -> str | None:
    """How what ``step`` adds to a token differs from what the layer's own forward adds, if it does.

    Experts louder than all else show how they are weighed, silent ones everything else.
    """
    holder: Any = step.experts if step.experts is not None else SimpleNamespace(fate_runtime=None)
    runtime, hooks = holder.fate_runtime, step.block._forward_pre_hooks
    rows = torch.randn(step.plain.router.num_experts, step.hidden, generator=generator)
    step.block._forward_pre_hooks = OrderedDict()  # ours would start reads
    try:
        for scale in (1e3, 0.0):
            holder.fate_runtime = _Pretender(scale * rows)
            tokens = (0.02 * torch.randn(_TRIES, 1, _PROBE_TOKENS, step.hidden, generator=generator)).bfloat16()
            differences = [_difference_on(step, scale * rows, x) for x in tokens]
            if None not in differences:
                return differences[0]
    except Exception as error:  # whatever a family's layer makes of this call
        return f"it cannot be called with a token and a cache ({error})"
    finally:
        holder.fate_runtime = runtime
        step.block._forward_pre_hooks = hooks
        step.ready = False
    return None


def _difference_on(step: CpuStep, experts: torch.Tensor, x: torch.Tensor) -> str | None:
    """``x`` [1, tokens, hidden]: all but the last token by the layer's own forward, the last by each of the two.

    What attention adds and what the block adds are compared apart.
    """
    residuals = list[torch.Tensor]()
    attention = step.plain.attention
    angles = torch.arange(_PROBE_TOKENS * (attention.rotary_dim // 2)).view(1, _PROBE_TOKENS, attention.rotary_dim // 2) * 0.7
    first, last = [(x[:, at], embeddings_of(attention, angles[:, at])) for at in (slice(None, -1), slice(-1, None))]
    config = step.config if attention.delta is not None else None  # a state is no layer of keys and values
    caches = DynamicCache(config=config), DynamicCache(config=config)
    for cache in caches:
        _own_forward(step, *first, cache)
        make_room(cache, _PROBE_TOKENS)
    room = step.room_in(caches[0], 1)
    if room is None:
        return "it keeps its keys and values in another way"
    mine, got = _by_parts(step, experts, *last, room)
    hook = step.post_norm.register_forward_pre_hook(lambda module, args: residuals.append(args[0].float()))
    try:
        want = _own_forward(step, *last, caches[1])
    finally:
        hook.remove()
    hidden, own = last[0].float(), residuals[0]
    return _apart("attention adds", mine - hidden, own - hidden, own) or _apart("the MoE block adds", got - mine, want - own, want)


def _own_forward(step: CpuStep, x: torch.Tensor, angles: Any, cache: Any) -> torch.Tensor:
    past = _PROBE_TOKENS - 1 if x.shape[1] == 1 else 0
    mask = mask_for(step.plain.attention, past, x.shape[1])
    positions = torch.arange(past, past + x.shape[1])[None]
    out: torch.Tensor = step.original(
        x.contiguous(),
        position_embeddings=angles,
        attention_mask=mask if step.plain.attention.delta is None else None,
        position_ids=positions,
        past_key_values=cache,
    )
    return out.float()


def _by_parts(step: CpuStep, experts: torch.Tensor, x: torch.Tensor, angles: Any, room: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One token through the parts of csrc/step.cpp, with the rows of ``experts`` for outputs: the residual stream after attention,
    and after the block."""
    threads, exact, top_k, hidden = torch.get_num_threads(), step.shared.exact, step.plain.router.top_k, step.hidden
    turned = cos_and_sin(angles) if angles is not None else (torch.empty(0), torch.empty(0))
    x, cos, sin = x.contiguous(), *(each.float().contiguous() for each in turned)
    residual, normed, beside, out = (torch.empty(1, 1, hidden, dtype=torch.bfloat16) for _ in range(4))
    chosen, weights, factors = torch.empty(top_k, dtype=torch.int64), torch.empty(top_k), torch.empty(1)
    past, *states = room.reserve(1)
    native.layer(
        step.until_experts, x.data_ptr(), native.Spans.make([1], [past], [0], [0]), cos.data_ptr(), sin.data_ptr(),
        native.Kv.make(*step.kv_of(*states)), residual.data_ptr(), normed.data_ptr(), chosen.data_ptr(), weights.data_ptr(),
        factors.data_ptr(), exact, threads,
    )  # fmt: skip
    room.extend(1)
    if step.beside is not None:
        native.mlp(step.beside, normed.data_ptr(), 1, 1, beside.data_ptr(), exact, threads)
    rows, at = experts[chosen].contiguous(), beside.data_ptr() if step.beside is not None else 0
    native.layer_end(
        residual.data_ptr(), rows.data_ptr(), weights.data_ptr(), 1, top_k, at, factors.data_ptr(), step.plain.residual_scale,
        step.block_norm, hidden, out.data_ptr(), 1,
    )  # fmt: skip
    return residual.float(), out.float()


def _apart(what: str, got: torch.Tensor, want: torch.Tensor, total: torch.Tensor) -> str | None:
    """Both were found as differences to ``total``, which is rounded to bf16."""
    distance = (got - want).norm()
    if bool(distance <= _NEAR * want.norm() + torch.finfo(torch.bfloat16).eps * total.norm()):
        return None
    return f"what {what} differs by {float(distance / want.norm().clamp(min=1e-30)):.1%} of its norm"
