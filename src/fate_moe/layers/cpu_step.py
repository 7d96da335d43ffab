"""One token through one decoder layer in four calls of the extension: what comes before the experts, the shared expert while
their reads are under way, the experts, the sum.

For layers of the plain kind: norm, attention, norm, experts behind a softmax router, perhaps a shared expert with a gate.
Which these are is found by trying, as in standard.py, and the family's own forward stays for everything else. Between two kernels
the weights of a layer have gone through the processor's caches, and whatever runs next runs from memory: the first softmax takes
19 us, the second 3. So it pays to have few steps, not fast ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from fate_moe.adapter.families import ROUTER_NAMES
from fate_moe.adapter.kv_cache import make_room
from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.core import Patcher
from fate_moe.kernels.native import DTYPES, native
from fate_moe.layers.modules import ModuleSnapshot, accelerated_by, room_in, weight_of
from fate_moe.runtime import ExpertRuntime

__all__ = ["join_layers"]

_SHARED = ("shared_expert", "shared_experts")
_PROBE_TOKENS = 6
_NEAR = 0.04  # of the norm of what the layer adds; a missing factor or another order of steps makes more than 0.1
_TRIES = 3  # a token whose k-th and next expert are nearly equal may be routed otherwise: no proof against a layer


@torch.no_grad()
def join_layers(model: Any, stacks: Sequence[ExpertStack], runtime: ExpertRuntime, exact: bool, patcher: Patcher) -> int:
    """Let the plain layers among those of ``stacks`` run so; how many."""
    if native is None or model.dtype != torch.bfloat16:
        return 0
    buffers: dict[str, torch.Tensor] = {}
    generator, steps = torch.Generator().manual_seed(0), list[_Step]()
    for stack in stacks:
        layer = model.get_submodule(stack.block.rpartition(".")[0])
        step = _step_of(layer, stack, runtime, exact, buffers)
        if step is not None and _alike(step, generator):
            patcher.replace(layer, "forward", step)
            steps.append(step)

    def before(module: nn.Module, args: Any) -> None:
        for step in steps:  # all at once: between kernels each would take 30 us, here 3
            step.ready = step.is_unchanged()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for step in steps:
            step.ready = False

    if steps:
        decoder = model.get_submodule(stacks[0].block.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0])
        patcher.hook(decoder, "before", before)
        patcher.hook(decoder, "after", after)
    return len(steps)


def _step_of(layer: Any, stack: ExpertStack, runtime: ExpertRuntime, exact: bool, buffers: dict[str, torch.Tensor]) -> _Step | None:
    name = stack.block.rpartition(".")[2]
    if {child for child, _ in layer.named_children()} != {"input_layernorm", "self_attn", "post_attention_layernorm", name}:
        return None
    block = getattr(layer, name)
    inside = dict(block.named_children())
    router = next((inside.pop(child) for child in ROUTER_NAMES if child in inside), None)
    experts, gate = inside.pop("experts", None), inside.pop("shared_expert_gate", None)
    shared = next((inside.pop(child) for child in _SHARED if child in inside), None)
    parts = [layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn, *([] if shared is None else [shared])]
    weights = [
        weight_of(part) for part in (router, gate) if part is not None and isinstance(getattr(part, "weight", None), nn.Parameter)
    ]
    if (
        router is None
        or experts is None
        or inside
        or stack.twins
        or (gate is not None and shared is None)
        or len(weights) != 1 + (gate is not None)
        or any(weight is None for weight in weights)
        or any(accelerated_by(part) is None for part in parts)
        or accelerated_by(parts[0]) != accelerated_by(parts[1])
        or layer.input_layernorm.weight.dtype != layer.post_attention_layernorm.weight.dtype
        or not runtime.has_fused(stack.layer, experts)
    ):
        return None
    return _Step(layer, stack, runtime, exact, buffers, experts, shared, router.weight, [*weights, None][:2], name)


class _Step:
    """A layer's forward: one token in four calls, else the layer's own."""

    def __init__(
        self,
        layer: Any,
        stack: ExpertStack,
        runtime: Any,
        exact: bool,
        buffers: dict[str, torch.Tensor],
        experts: Any,
        shared: Any,
        router: torch.Tensor,
        weights: list[Any],
        block: str,
    ) -> None:
        self.original, self.runtime, self.stack, self.experts = layer.forward, runtime, stack, experts
        self.index, self.block = layer.self_attn.layer_idx, getattr(layer, block)
        self.hidden = layer.input_layernorm.weight.numel()
        self._attention, self._router, self._weights = layer.self_attn, router, weights
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._shared = accelerated_by(shared) if shared is not None else None
        self._exact = exact
        # Written and read within one call, so all layers share them.
        size = (1, self.hidden)
        for name in ("residual", "normed", "shared"):
            buffers.setdefault(name, torch.empty(size, dtype=torch.bfloat16))
        rows = buffers.setdefault("rows", torch.empty(0))
        if len(rows) < stack.top_k:
            buffers["rows"], buffers["weights"] = torch.empty(stack.top_k, self.hidden), torch.empty(stack.top_k)
        self._buffers = buffers
        inner = [layer.self_attn, *([shared] if shared is not None else [])]
        self._watch = ModuleSnapshot([layer, self.block, *inner], hooked=[self.block])
        self.ready = True  # set for each pass of the decoder
        self.normalize(False)

    @contextmanager
    def flattened(self) -> Iterator[None]:
        """Meanwhile the router has logits of about 1 for any token, so that what it chooses has not all of the probability.

        A trained router may be sure of every random token; then weights that add up to 1 anyway do not tell whether they are
        made to."""
        whole = self._router.detach().clone()
        steepest = float((whole.float() * self._norms[1].weight.float()).norm(dim=1).max())
        try:
            with torch.no_grad():
                self._router.mul_(1 / max(1.0, steepest))
            yield
        finally:
            with torch.no_grad():
                self._router.copy_(whole)

    def is_unchanged(self) -> bool:
        """Whether the layer is as it was found and the runtime can do it."""
        return self._watch.same() and self.runtime.has_fused(self.stack.layer, self.experts)

    def normalize(self, normalize: bool) -> None:
        """Whether the weights of a token's experts add up to 1."""
        first, second = self._norms
        gate = self._weights[1] if self._weights[1] is not None else native.Weight.make(self._weights[0].place, 0, 0, 0)
        self._of = native.Layer.make(
            first.weight.data_ptr(), second.weight.data_ptr(), DTYPES[first.weight.dtype], accelerated_by(first),
            accelerated_by(self._attention), self._weights[0], gate, self.stack.top_k, normalize,
        )  # fmt: skip

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        room = room_in(kwargs.get("past_key_values"), self.index)
        angles = kwargs.get("position_embeddings")
        if (
            room is None
            or angles is None
            or args
            or kwargs.get("attention_mask") is not None
            or hidden_states.numel() != self.hidden
            or hidden_states.dtype != torch.bfloat16
            or hidden_states.requires_grad
            or angles[0].dtype != torch.bfloat16
            or angles[0].numel() != self._attention.head_dim
            or not self.ready
            or any(self._watch.hooks)  # transformers adds some in the midst of a pass, to record outputs
        ):
            return self.original(hidden_states, *args, **kwargs)
        return self._run(hidden_states.contiguous(), angles[0].contiguous(), angles[1].contiguous(), room)

    def _run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, room: Any) -> torch.Tensor:
        layer, threads, exact = self.stack.layer, torch.get_num_threads(), self._exact
        normed, rows, gates = self._buffers["normed"], self._buffers["rows"], self._buffers["weights"]
        residual, weights, shared = (self._buffers[name].data_ptr() for name in ("residual", "weights", "shared"))
        past, keys, values = room.reserve(1)
        chosen, factor = native.layer(
            self._of, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), past, keys.shape[2],
            residual, normed.data_ptr(), weights, exact, threads,
        )  # fmt: skip
        room.extend(1)
        lease = self.runtime.begin(layer, normed, chosen, gates)
        if self._shared is not None:
            native.mlp(self._shared, normed.data_ptr(), 1, 1, shared, exact, threads)
        self.runtime.run(layer, self.experts, lease, chosen, normed, rows[: len(chosen)])
        out = torch.empty_like(x)
        beside = shared if self._shared is not None else 0
        native.layer_end(residual, rows.data_ptr(), weights, len(chosen), beside, factor, self.hidden, out.data_ptr())
        return out


class _Pretender:
    """A runtime whose experts give fixed rows, whatever they are given."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows  # [num_experts, hidden]

    def compute(self, layer: int, experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (self.rows[index] * weights.float().unsqueeze(-1)).sum(1).to(hidden.dtype)

    def has_fused(self, layer: int, experts: Any) -> bool:
        return True

    def begin(self, layer: int, hidden: torch.Tensor, chosen: Sequence[int], weights: torch.Tensor) -> None:
        """There is nothing to wait for."""

    def run(self, layer: int, experts: Any, lease: Any, chosen: Sequence[int], hidden: torch.Tensor, rows: torch.Tensor) -> None:
        rows.copy_(self.rows[list(chosen)])


def _alike(step: _Step, generator: torch.Generator) -> bool:
    """Whether ``step`` adds to a token what the layer's own forward adds; the way to weigh experts with which it does is set."""
    runtime, hooks = step.runtime, step.block._forward_pre_hooks
    rows = torch.randn(step.stack.num_experts, step.hidden, generator=generator)
    step.block._forward_pre_hooks = OrderedDict()  # ours would start reads
    try:
        with step.flattened():
            ways = [normalize for normalize in (False, True) if _alike_so(step, normalize, rows, generator)]
        # Where both will do, the probes cannot tell; but for a router that chooses everything there is nothing to tell.
        if len(ways) == 1 or (ways and step.stack.top_k == step.stack.num_experts):
            step.normalize(ways[0])
            step.ready = False
            return True
    except Exception:  # a layer that wants other things
        return False
    finally:
        step.runtime = step.experts.fate_runtime = runtime
        step.block._forward_pre_hooks = hooks
    return False


def _alike_so(step: _Step, normalize: bool, rows: torch.Tensor, generator: torch.Generator) -> bool:
    """Experts louder than all else show how they are weighed, silent ones everything else."""
    step.normalize(normalize)
    return all(_alike_with(step, _Pretender(scale * rows), generator) for scale in (1e3, 0.0))


def _alike_with(step: _Step, pretender: _Pretender, generator: torch.Generator) -> bool:
    step.runtime = step.experts.fate_runtime = pretender
    tokens = (0.02 * torch.randn(_TRIES, 1, _PROBE_TOKENS, step.hidden, generator=generator)).bfloat16()
    return any(_alike_on(step, x) for x in tokens)


def _alike_on(step: _Step, x: torch.Tensor) -> bool:
    """``x`` [1, tokens, hidden]: all but the last token by the layer's own forward, the last by each of the two.

    What attention adds and what the block adds are compared apart.
    """
    dim, residuals = step._attention.head_dim, []
    angles = torch.arange(_PROBE_TOKENS * (dim // 2)).view(1, _PROBE_TOKENS, -1).repeat(1, 1, 2) * 0.7
    outputs = []
    hook = step._norms[1].register_forward_pre_hook(lambda module, args: residuals.append(args[0].clone()))
    try:
        for function in (step.original, step):
            cache = DynamicCache()
            for tokens in (slice(None, -1), slice(-1, None)):
                position = (angles[:, tokens].cos().bfloat16(), angles[:, tokens].sin().bfloat16())
                hidden = x[:, tokens].contiguous()
                run = step.original if tokens.start is None else function
                if run is step:
                    hook.remove()  # it would make the step stand back
                out: Any = run(hidden, position_embeddings=position, attention_mask=None, past_key_values=cache)
                make_room(cache, _PROBE_TOKENS)
            outputs.append(out.float())
    finally:
        hook.remove()
    mine, own = step._buffers["residual"].float(), residuals[1].float()
    by_attention = _near(mine - hidden.float(), own - hidden.float(), own)
    return by_attention and _near(outputs[1] - mine, outputs[0] - own, outputs[0]) and room_in(cache, step.index) is not None


def _near(got: torch.Tensor, want: torch.Tensor, total: torch.Tensor) -> bool:
    """Both were found as differences to ``total``, which is rounded to bf16."""
    return bool((got - want).norm() <= _NEAR * want.norm() + torch.finfo(torch.bfloat16).eps * total.norm())
