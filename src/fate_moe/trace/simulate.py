"""What a policy and a predictor would have done on a recorded trace: the production code, in virtual time. Torch only for gates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fate_moe.core import Counters, EvictionPolicy, Predictor
from fate_moe.errors import ConfigError
from fate_moe.predict.activation_path import ActivationPath
from fate_moe.predict.null import NoPrediction
from fate_moe.predict.prefetcher import Prefetcher
from fate_moe.predict.temporal import Temporal
from fate_moe.registry import PRESETS, make_policy
from fate_moe.trace.belady import Belady
from fate_moe.trace.oracle import Oracle
from fate_moe.trace.schema import RoutingTrace
from fate_moe.trace.virtual import VirtualResidency

if TYPE_CHECKING:
    import torch

    from fate_moe.store.learned import Gates

__all__ = ["Link", "Row", "policy_for", "predictor_for", "simulate", "size_of_all"]


@dataclass(frozen=True)
class Link:
    """The time model: one read at a time at ``bytes_per_second``, of use ``latency_seconds`` after its last byte; a layer computes
    for ``layer_seconds``, of which the first ``overlap_seconds`` need no missing expert (the shared expert, the resident experts)
    and hide as much of the wait. Predicting a layer takes ``predicting_seconds``, which hide some of a wait too."""

    bytes_per_second: float
    expert_bytes: int
    layer_seconds: float
    overlap_seconds: float = 0.0
    latency_seconds: float = 0.0
    predicting_seconds: float = 0.0

    @property
    def transfer_seconds(self) -> float:
        return self.expert_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Row:
    """One simulated run; ``capacity`` is a fraction of all experts. Amounts are totals unless named per token."""

    policy: str
    predictor: str
    capacity: float
    num_tokens: int
    lookups: int
    miss_rate: float
    ready_on_time: float
    bytes_per_token: float
    stall_seconds: float
    tokens_per_second: float
    prefetched: int
    prefetch_used: int
    lookups_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def size_of_all(expert_bytes: Any) -> Any:
    """``expert_bytes`` of a trace's meta, if all experts have one size; the simulator supports nothing else.

    Raises ConfigError for the trace of a mixed store.
    """
    if isinstance(expert_bytes, list):
        raise ConfigError(
            f"this trace is of a mixed store, with experts of {', '.join(map(str, expert_bytes))} bytes; the simulator needs one "
            "size for all: give it with --expert-bytes, and omit --as-recorded"
        )
    return expert_bytes


def policy_for(name: str, trace: RoutingTrace, num_slots: int) -> EvictionPolicy:
    """A policy by its name in registry.POLICIES, "best" for the default, or "belady" for the offline bound."""
    if name == "belady":
        return Belady(trace)
    return make_policy(PRESETS["best"].policy if name == "best" else name, num_slots, trace.num_experts.tolist())


def predictor_for(
    name: str, trace: RoutingTrace, gates: Gates | None = None, policy: EvictionPolicy | None = None, look_ahead: int = 1
) -> Predictor:
    """A predictor by its name in registry.PREDICTORS, or "oracle" for the bound.

    Most predictors need a trace with router inputs and routers. ``gates`` are fitted ones (store.learned.load_gates); ``policy``
    may have statistics that the predictor uses too. Raises ConfigError if the trace lacks what the predictor needs.
    """
    sizes = trace.num_experts.tolist()
    if name == "none":
        return NoPrediction()
    if name == "oracle":
        return Oracle(trace)
    if name == "temporal":
        return Temporal(sizes)
    if name == "activation-path":
        return ActivationPath(sizes)
    if not {"router_inputs", "routers", "embeddings"} <= set(trace.extras):
        raise ConfigError(f"predictor {name!r} needs a trace with router inputs; record one with: fate trace --router-inputs")
    import torch

    from fate_moe.core import Routing
    from fate_moe.predict.gates import FittedGates
    from fate_moe.predict.predictors import Known
    from fate_moe.registry import make_predictor

    top_k = trace.experts.shape[2]

    def router(weight: torch.Tensor) -> Callable[[torch.Tensor], Routing]:
        def route(hidden: torch.Tensor) -> Routing:
            scores = hidden @ weight.mT
            return Routing(scores.topk(top_k, dim=-1).indices, scores)

        return route

    weights = [
        torch.from_numpy(weight[:size].astype(np.float32)) for weight, size in zip(trace.extras["routers"], sizes, strict=True)
    ]
    known = Known(
        [router(weight) for weight in weights],
        linear=weights,
        norms=torch.from_numpy(trace.extras["norms"]) if "norms" in trace.extras else None,
        fitted=None if gates is None else FittedGates(*gates.ahead),
        forecast=gates.forecast if gates is not None and gates.forecast else None,
        history=getattr(policy, "statistics", None),
    )
    return make_predictor(name, sizes, top_k, known, look_ahead)


def simulate(
    trace: RoutingTrace,
    policy: str,
    predictor: str,
    capacity: float,
    link: Link,
    *,
    gates: Gates | None = None,
    look_ahead: int = 1,
    skip: int = 0,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Row:
    """Replay ``trace`` from an empty expert cache of ``capacity`` (a fraction of all), not counting the first ``skip`` tokens.

    ``advance`` gets the number of tokens that are done. Raises ConfigError for unknown names and for capacities below one token's
    experts in one layer.
    """
    num_slots = int(capacity * int(trace.num_experts.sum()) + 1e-9)
    if num_slots < trace.experts.shape[2] or not 0 <= skip < trace.num_tokens:
        raise ConfigError(
            f"a capacity of {capacity:.2%} is below one token's experts in one layer, or the trace has no more than {skip} tokens; "
            "simulate a larger capacity or skip fewer tokens"
        )
    evictor = policy_for(policy, trace, num_slots)
    residency = VirtualResidency(evictor, num_slots, link.transfer_seconds, link.expert_bytes, link.latency_seconds)
    made_predictor = predictor_for(predictor, trace, gates, evictor, look_ahead)
    prefetcher = Prefetcher(residency, made_predictor, trace.num_layers, lambda: residency.now, look_ahead)
    inputs, embeddings = _inputs(trace)
    began, skipped, virtual = time.perf_counter(), Counters(), 0.0
    rows = trace.experts.tolist()
    starts = set(trace.start.tolist())
    for token, layers in enumerate(rows):
        if token == skip:
            skipped, virtual = replace(residency.counters), residency.now
        _pass(residency, prefetcher, layers, link, inputs, embeddings, token, token in starts)
        if token % 256 == 255:
            advance(256)
    advance(len(rows) % 256)
    elapsed = time.perf_counter() - began
    counters, counted = residency.counters.since(skipped), len(rows) - skip
    seconds = residency.now - virtual
    return Row(
        policy=policy,
        predictor=predictor,
        capacity=capacity,
        num_tokens=counted,
        lookups=counters.lookups,
        miss_rate=counters.misses / counters.lookups,
        ready_on_time=counters.ready_on_time,
        bytes_per_token=counters.bytes_read / counted,
        stall_seconds=counters.stall_seconds,
        tokens_per_second=counted / seconds if seconds else 0.0,
        prefetched=counters.prefetched,
        prefetch_used=counters.prefetch_used,
        lookups_per_second=residency.counters.lookups / elapsed,
    )


def _pass(
    residency: VirtualResidency,
    prefetcher: Prefetcher,
    layers: list[list[int]],
    link: Link,
    inputs: Any,
    embeddings: Any,
    token: int,
    begins: bool,
) -> None:
    """One token through all layers."""
    if prefetcher.idle:
        for layer, experts in enumerate(layers):
            asked = residency.now
            residency.acquire(layer, experts)
            _hide(residency, residency.now - asked, link.overlap_seconds)
            residency.now += link.layer_seconds
        return
    if begins and isinstance(prefetcher.predictor, ActivationPath):
        prefetcher.predictor.predict(0, cast("torch.Tensor", np.zeros((2, 0), np.float32)))  # as a prompt would
    prefetcher.embedded(embeddings(token))
    for layer, experts in enumerate(layers):
        prefetcher.entered(layer, 1)
        asked = residency.now
        residency.acquire(layer, experts)
        waited = residency.now - asked
        prefetcher.look_ahead(layer, inputs(token, layer))
        predicting = link.predicting_seconds if layer + 1 in prefetcher.predicted else 0.0
        residency.counters.predicting_seconds += predicting
        residency.now += predicting
        _hide(residency, waited, link.overlap_seconds + predicting)
        prefetcher.observe(layer, experts)
        residency.now += link.layer_seconds


def _hide(residency: VirtualResidency, waited: float, overlap: float) -> None:
    """``overlap`` seconds of compute run while reads are under way: the wait is shorter by as much."""
    hidden = min(overlap, waited)
    residency.now -= hidden
    residency.counters.stall_seconds -= hidden


def _inputs(trace: RoutingTrace) -> tuple[Callable[[int, int], Any], Callable[[int], Any]]:
    """Router inputs by token and layer and embeddings by token, [1, D]; placeholders where the trace has none."""
    nothing = np.zeros((1, 0), np.float32)
    if "router_inputs" not in trace.extras:
        return (lambda token, layer: nothing), (lambda token: nothing)
    import torch

    router_inputs, embeddings = trace.extras["router_inputs"], trace.extras.get("embeddings")
    return (
        lambda token, layer: torch.from_numpy(router_inputs[token, layer].astype(np.float32))[None],
        lambda token: nothing if embeddings is None else torch.from_numpy(embeddings[token].astype(np.float32))[None],
    )
