"""Tokens through one plain decoder layer in four calls of the extension: what comes before the experts, the shared expert while
their reads are under way, the experts, the sum. A token's bits do not depend on how many there are in a call.

``plain.py`` says which layers these are, and the family's own forward stays for all other calls. Between two kernels the weights of
a layer have gone through the processor's caches, and whatever runs next runs from memory. So it pays to have few steps.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from fate_moe.adapter.kv_cache import make_room, room_for
from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.core import Patcher
from fate_moe.kernels.native import BF16, DTYPES, native
from fate_moe.kernels.plain_layer import PlainLayer, Router
from fate_moe.kernels.routing import SCORES
from fate_moe.layers.attentions import is_causal, mask_for, takes_tokens
from fate_moe.layers.modules import accelerated_by
from fate_moe.layers.plain import NotPlain, cpu_reasons, plain_decoder
from fate_moe.layers.snapshot import ModuleSnapshot, StandIn
from fate_moe.layers.weights import native_norm, router_weight, takes_many, warn_of_difference, weight_of
from fate_moe.runtime import ExpertRuntime

__all__ = ["join_layers"]

_log = logging.getLogger(__name__)

_PROBE_TOKENS = 6
_NEAR = 0.04  # of the norm of what the layer adds; a missing factor or another order of steps makes more than 0.1
_TRIES = 3  # a token whose k-th and next expert are nearly equal may be routed otherwise: no proof against a layer


@torch.no_grad()
def join_layers(model: Any, stacks: Sequence[ExpertStack], runtime: ExpertRuntime, exact: bool, patcher: Patcher) -> int:
    """Let the plain layers among those of ``stacks`` run so; how many. Comes after ``accelerate``, whose kernels they use.

    ``exact``: quantized weights are multiplied with fp32 activations. Why a layer is left as it is, is logged.
    """
    buffers: dict[str, torch.Tensor] = {}
    generator, steps, by_layer = torch.Generator().manual_seed(0), list[CpuStep](), {stack.layer: stack for stack in stacks}
    for plain in plain_decoder(model):
        stack = by_layer.get(plain.layer)
        if isinstance(plain, NotPlain):
            reasons: Sequence[str] = plain.reasons
        else:
            reasons = cpu_reasons(plain, model.dtype) or _missing_kernels(model, plain, stack, runtime)
        if reasons or isinstance(plain, NotPlain):
            _log.info("%s runs its own forward: %s", plain.path, "; ".join(reasons))
            continue
        step = CpuStep(model, plain, stack, runtime, exact, buffers)
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

    if steps:
        decoder = model.get_submodule(steps[0].plain.path.rpartition(".")[0].rpartition(".")[0])
        patcher.hook(decoder, "before", before)
        patcher.hook(decoder, "after", after)
    return len(steps)


def _missing_kernels(model: Any, plain: PlainLayer, stack: ExpertStack | None, runtime: ExpertRuntime) -> list[str]:
    """The parts of a plain layer that the extension cannot run as their weights are."""
    layer = model.get_submodule(plain.path)
    block = layer.get_submodule(plain.block)
    reasons = []
    parts = {"input_layernorm": layer, "post_attention_layernorm": layer, "self_attn": layer}
    if plain.shared is not None:
        parts[plain.shared.name] = block
    for name, owner in parts.items():
        if accelerated_by(owner.get_submodule(name)) is None:
            reasons.append(f"no kernel runs its {name}")
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


class CpuStep(StandIn):
    """A plain layer's forward: tokens of one sequence in four calls, else the layer's own."""

    def __init__(
        self,
        model: Any,
        plain: PlainLayer,
        stack: ExpertStack | None,
        runtime: Any,
        exact: bool,
        buffers: dict[str, torch.Tensor],
    ) -> None:
        """``buffers`` are shared by all layers: they are written and read within one call. A dense layer has no ``stack``."""
        layer = model.get_submodule(plain.path)
        self.block = layer.get_submodule(plain.block)
        self.original, self.runtime, self.stack = layer.forward, runtime, stack
        self.experts = self.block.experts if stack is not None else None
        self.plain, self.index, self.hidden = plain, plain.attention.index, plain.hidden
        self.post_norm = layer.post_attention_layernorm
        shared = self.block.get_submodule(plain.shared.name) if plain.shared is not None else None
        self._shared = accelerated_by(shared) if shared is not None else None
        self._exact = exact
        projections = [layer.self_attn.get_submodule(f"{name}_proj") for name in "qkvo"]
        if shared is not None:
            projections += [shared.gate_proj, shared.up_proj, shared.down_proj]
        self._many = takes_many(projections, exact)
        size = (1, self.hidden)
        for name in ("residual", "normed", "shared"):
            buffers.setdefault(name, torch.empty(size, dtype=torch.bfloat16))
        rows, top_k = buffers.setdefault("rows", torch.empty(0, dtype=torch.float32)), max(1, plain.router.top_k)
        if len(rows) < top_k:
            buffers["rows"] = torch.empty(top_k, self.hidden, dtype=torch.float32)
            buffers["weights"] = torch.empty(top_k, dtype=torch.float32)
            buffers["chosen"] = torch.empty(top_k, dtype=torch.int64)
            buffers["factors"] = torch.empty(1, dtype=torch.float32)
        self.buffers = buffers
        inner = [layer.self_attn, *([shared] if shared is not None else [])]
        router = gate = native.Weight.make(native.Place.make(BF16, 0, self.hidden, [0], 0, 0, -1, 0), 0, 0, 0)  # none
        if stack is not None:
            inner += [self.experts, self.block.get_submodule(plain.router_name)]
            router = router_weight(inner[-1])
        if plain.shared is not None and plain.shared.gate is not None:
            gate = weight_of(self.block.get_submodule(plain.shared.gate))
        self._snapshot = ModuleSnapshot(list(dict.fromkeys([layer, self.block, *inner])))
        self.ready = True  # set for each pass of the decoder
        norms = native_norm(layer.input_layernorm, plain.input_norm), native_norm(layer.post_attention_layernorm, plain.post_norm)
        routing = _native_router(self.block, plain.router)
        self.of = native.Layer.make(*norms, accelerated_by(layer.self_attn), router, gate, routing, plain.residual_scale)

    def is_unchanged(self) -> bool:
        """Whether the layer is as it was found."""
        return self._snapshot.same()

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x, angles, attention = hidden_states, kwargs.get("position_embeddings"), self.plain.attention
        count, cache, mask = x.numel() // self.hidden, kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if (
            angles is None
            or args
            or not takes_tokens(x, angles, count, attention, self._many)
            or not self.ready
            or self._snapshot.hooked()  # transformers adds some in the midst of a pass, to record outputs
            or (
                self.experts is not None and self.experts.fate_runtime is not self.runtime
            )  # somebody watches the experts' inputs (tools/calibrate.py)
        ):
            return self.original(hidden_states, *args, **kwargs)
        room = room_for(cache, self.index, attention.kv_heads, attention.head_dim)
        if (room is None and (cache is not None or not self._many)) or not is_causal(
            mask, room.get_seq_length() if room else 0, count, attention.window
        ):
            return self.original(hidden_states, *args, **kwargs)
        run = self._run if count == 1 and room is not None else self._run_many
        return run(x.contiguous(), angles[0].contiguous(), angles[1].contiguous(), room)

    def _run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, room: Any) -> torch.Tensor:
        threads, exact = torch.get_num_threads(), self._exact
        normed, rows, gates = self.buffers["normed"], self.buffers["rows"], self.buffers["weights"]
        residual, weights, shared, experts, factors = (
            self.buffers[name].data_ptr() for name in ("residual", "weights", "shared", "chosen", "factors")
        )
        past, keys, values = room.reserve(1)
        chosen = native.layer(
            self.of, x.data_ptr(), 1, cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), past, keys.shape[2],
            residual, normed.data_ptr(), experts, weights, factors, exact, threads,
        )  # fmt: skip
        room.extend(1)
        lease = self.runtime.begin(self.plain.layer, normed, chosen, gates) if chosen else None
        if self._shared is not None:
            native.mlp(self._shared, normed.data_ptr(), 1, 1, shared, exact, threads)
        if chosen:
            self.runtime.run(self.plain.layer, self.experts, lease, chosen, normed, rows[: len(chosen)])
        out = torch.empty_like(x)
        beside, scale = shared if self._shared is not None else 0, self.plain.residual_scale
        native.layer_end(residual, rows.data_ptr(), weights, 1, len(chosen), beside, factors, scale, self.hidden, out.data_ptr(), 1)
        return out

    def _run_many(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, room: Any) -> torch.Tensor:
        """As ``_run``; without ``room`` keys and values are forgotten."""
        layer, threads, exact = self.plain.layer, torch.get_num_threads(), self._exact
        count, top_k, attention = x.numel() // self.hidden, self.plain.router.top_k, self.plain.attention
        residual, normed, shared = (torch.empty(count, self.hidden, dtype=torch.bfloat16) for _ in range(3))
        chosen = torch.empty(count, top_k, dtype=torch.int64)
        weights, factors = torch.empty(count, top_k, dtype=torch.float32), torch.empty(count, dtype=torch.float32)
        if room is not None:
            past, keys, values = room.reserve(count)
        else:
            past, keys, values = 0, *torch.empty(2, 1, attention.kv_heads, count, attention.head_dim, dtype=torch.bfloat16)
        native.layer(
            self.of, x.data_ptr(), count, cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), past, keys.shape[2],
            residual.data_ptr(), normed.data_ptr(), chosen.data_ptr(), weights.data_ptr(), factors.data_ptr(), exact, threads,
        )  # fmt: skip
        if room is not None:
            room.extend(count)
        if top_k:
            self.runtime.begin_many(layer, normed, chosen, weights)
        if self._shared is not None:
            native.mlp(self._shared, normed.data_ptr(), 1, count, shared.data_ptr(), exact, threads)
        rows = self.runtime.run_many(layer, self.experts, normed, chosen, weights) if top_k else factors
        out = torch.empty_like(x)
        beside = shared.data_ptr() if self._shared is not None else 0
        native.layer_end(
            residual.data_ptr(), rows.data_ptr(), weights.data_ptr(), count, top_k, beside, factors.data_ptr(),
            self.plain.residual_scale, self.hidden, out.data_ptr(), threads,
        )  # fmt: skip
        return out


class _Pretender:
    """A runtime whose experts give fixed rows, whatever they are given."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows  # [num_experts, hidden]

    def compute(self, layer: int, experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (self.rows[index] * weights.float().unsqueeze(-1)).sum(1).to(hidden.dtype)

    def begin(self, layer: int, hidden: torch.Tensor, chosen: Sequence[int], weights: torch.Tensor) -> None:
        """There is nothing to wait for."""

    def run(self, layer: int, experts: Any, lease: Any, chosen: Sequence[int], hidden: torch.Tensor, rows: torch.Tensor) -> None:
        rows.copy_(self.rows[list(chosen)])


def _difference(step: CpuStep, generator: torch.Generator) -> str | None:
    """How what ``step`` adds to a token differs from what the layer's own forward adds, if it does.

    Experts louder than all else show how they are weighed, silent ones everything else.
    """
    runtime, hooks, experts = step.runtime, step.block._forward_pre_hooks, step.experts
    rows = torch.randn(step.plain.router.num_experts, step.hidden, generator=generator)
    step.block._forward_pre_hooks = OrderedDict()  # ours would start reads
    try:
        for scale in (1e3, 0.0):
            step.runtime = _Pretender(scale * rows)
            if experts is not None:
                experts.fate_runtime = step.runtime
            tokens = (0.02 * torch.randn(_TRIES, 1, _PROBE_TOKENS, step.hidden, generator=generator)).bfloat16()
            differences = [_difference_on(step, x) for x in tokens]
            if None not in differences:
                return differences[0]
    except Exception as error:  # whatever a family's layer makes of this call
        return f"it cannot be called with a token and a cache ({error})"
    finally:
        step.runtime = runtime
        if experts is not None:
            experts.fate_runtime = runtime
        step.block._forward_pre_hooks = hooks
        step.ready = False
    return None


def _difference_on(step: CpuStep, x: torch.Tensor) -> str | None:
    """``x`` [1, tokens, hidden]: all but the last token by the layer's own forward, the last by each of the two.

    What attention adds and what the block adds are compared apart.
    """
    attention, residuals = step.plain.attention, []
    dim = attention.rotary_dim
    angles = torch.arange(_PROBE_TOKENS * (dim // 2)).view(1, _PROBE_TOKENS, -1) * 0.7
    angles = angles.repeat(1, 1, 1 if attention.half_angles else 2)
    outputs = []
    hook = step.post_norm.register_forward_pre_hook(lambda module, args: residuals.append(args[0].clone()))
    try:
        for function in (step.original, step):
            cache = DynamicCache()
            for tokens in (slice(None, -1), slice(-1, None)):
                position = (angles[:, tokens].cos().bfloat16(), angles[:, tokens].sin().bfloat16())
                hidden = x[:, tokens].contiguous()
                run = step.original if tokens.start is None else function
                if run is step:
                    hook.remove()  # it would make the step stand back
                mask = mask_for(attention, tokens.start % _PROBE_TOKENS if tokens.start else 0, hidden.shape[1])
                out: Any = run(hidden, position_embeddings=position, attention_mask=mask, past_key_values=cache)
                make_room(cache, _PROBE_TOKENS)
            outputs.append(out.float())
    finally:
        hook.remove()
    if room_for(cache, step.index, attention.kv_heads, attention.head_dim) is None:
        return "it keeps its keys and values in another way"
    mine, own = step.buffers["residual"].float(), residuals[1].float()
    return _apart("attention adds", mine - hidden.float(), own - hidden.float(), own) or _apart(
        "the MoE block adds", outputs[1] - mine, outputs[0] - own, outputs[0]
    )


def _apart(what: str, got: torch.Tensor, want: torch.Tensor, total: torch.Tensor) -> str | None:
    """Both were found as differences to ``total``, which is rounded to bf16."""
    distance = (got - want).norm()
    if bool(distance <= _NEAR * want.norm() + torch.finfo(torch.bfloat16).eps * total.norm()):
        return None
    return f"what {what} differs by {float(distance / want.norm().clamp(min=1e-30)):.1%} of its norm"
