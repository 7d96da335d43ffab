"""One token's way through one MoE block: route -> acquire -> (prefetch the next) -> compute -> release."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fate_moe.core import ExpertId, Predictor, Router, Routing
from fate_moe.errors import ConfigError
from fate_moe.journal import Journal, Observer
from fate_moe.kernels.cpu import SlotExperts
from fate_moe.kernels.gradients import flows, frozen, refuse_transforms
from fate_moe.memory.residency import Lease, Residency
from fate_moe.memory.view_selector import ViewSelector
from fate_moe.predict.native_prefetcher import make_prefetcher
from fate_moe.turns import Turn

__all__ = ["ExpertRuntime", "rows_by_expert"]


def rows_by_expert(index: torch.Tensor, num_experts: int) -> dict[int, list[int]]:
    """The rows of ``index.reshape(-1)`` that chose each expert, most chosen expert first, ties in routing order.

    ``index`` [num_tokens, top_k] int64. Entries outside 0..num_experts-1 (families mask choices so) belong to no expert.
    """
    rows: dict[int, list[int]] = {}
    for row, expert in enumerate(index.reshape(-1).tolist()):
        if 0 <= expert < num_experts:
            rows.setdefault(expert, []).append(row)
    return rows if len(rows) == index.numel() else dict(sorted(rows.items(), key=lambda item: -len(item[1])))


class ExpertRuntime:
    """Runs the experts of a model whose experts live elsewhere. A pass is run by one thread, which holds ``passing``.

    A layer runs by ``enter`` and ``compute`` (before and after the family's own router). A step in C++, for layers with
    ``has_fused`` experts, asks ``memory`` for its experts instead. That calls ``begin_step`` and ``end_step`` in those passes in
    which somebody wants to know what is routed, and no Python in others. Both ways write the same journal while observed.

    Same numbers: an expert's output depends on its tokens alone and is stored by (token, choice) row; rows are reduced in routing
    order. So neither the order of arrival nor the number of slots changes a bit.
    """

    def __init__(
        self,
        residency: Residency,
        predictor: Predictor,
        routers: Sequence[Router | None],
        slots: SlotExperts,
        *,
        num_experts: Sequence[int],
        view_selector: ViewSelector,
        top_k: Sequence[int] = (),
        look_ahead: int = 1,
        check: bool = False,
    ) -> None:
        """By layer: ``num_experts``, and ``top_k``, which only ``memory`` needs. ``check``: after each pass, raise RuntimeError if
        the residency's tables do not agree."""
        self.residency = residency
        self.passing = Turn()
        self.view_selector = view_selector
        self._prefetcher = make_prefetcher(residency, predictor, len(routers), look_ahead)
        self._routers = routers
        self._slots = slots
        self.num_experts = num_experts
        self._claim: tuple[int, torch.Tensor, dict[int, list[int]], Lease] | None = None
        self._journal: Journal | None = None  # while somebody observes
        self._check = check
        self._top_k, self._hidden = top_k, 0
        self.is_watched = False  # a step in C++ calls Python for each layer of this pass
        self._watcher = "none"  # what watches ``memory``
        self._in_step: list[int] = []  # the experts of the block that a step runs, as it named them
        # The object that a step in C++ asks for experts (csrc/expert_memory.h); None where the extension is not built.
        self.memory: Any = getattr(residency, "native", None)
        if self.memory is not None:
            residency.count_uses(*view_selector.counts)  # type: ignore[attr-defined]

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Meanwhile ``observer`` gets every forward pass, each when the next begins and the last at the end.

        Raises ConfigError if another observer is there.
        """
        with self.passing:
            if self._journal is not None:
                raise ConfigError("this model is observed already; leave the other `with ... observe(...)` first")
            self._journal = journal = Journal(observer, self.residency)
        try:
            yield
        finally:
            with self.passing:
                self._journal = None
                journal.close()

    def preload(self, experts: Sequence[ExpertId]) -> None:
        """Read ``experts`` in the background, in their order, until the first pass begins."""
        self._prefetcher.preload(experts)

    def embedded(self, embeddings: torch.Tensor) -> None:
        """A forward pass begins on these ``embeddings`` [..., hidden]: layer 0 may be read ahead."""
        refuse_transforms()
        flat = embeddings.detach().reshape(-1, embeddings.shape[-1])
        if self._journal is not None:
            self._journal.embedded(flat)
        self._prefetcher.embedded(flat)
        self._hidden = flat.shape[1]
        if self.memory is not None:
            self._watch()

    def enter(self, layer: int, router_input: torch.Tensor, training: bool = False) -> None:
        """MoE block ``layer`` is about to run on ``router_input`` [..., hidden]: start its reads, then those of the next block.

        ``training``: its router may draw random numbers (dropout), so no router is asked early and reads begin with ``compute``.
        """
        refuse_transforms()
        hidden = router_input.detach().reshape(-1, router_input.shape[-1])
        if self._journal is not None:
            self._journal.entered(layer, hidden)
        self._prefetcher.entered(layer, hidden.shape[0])
        if training:
            return
        route = self._routers[layer]
        if route is not None:
            routing = route(hidden)
            self._acquire(layer, routing.experts, routing)
        self._prefetcher.look_ahead(layer, hidden)

    def compute(
        self, layer: int, experts: Any, hidden: torch.Tensor, index: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, [num_tokens, hidden].

        ``experts`` is the transformers module, ``hidden`` [num_tokens, hidden], ``index`` and ``routing_weights``
        [num_tokens, top_k]. Differentiable once with respect to ``hidden`` and ``routing_weights``; backward reads the experts
        again. Raises StoreError if an expert cannot be read whole.
        """
        refuse_transforms()
        forward = partial(self._compute, layer, experts, index)
        if not flows(hidden, routing_weights):
            return forward(hidden, routing_weights)[0]
        return frozen(forward, partial(self._gradients, layer, experts, index), hidden, routing_weights)

    def _compute(
        self, layer: int, experts: Any, index: torch.Tensor, hidden: torch.Tensor, routing_weights: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, int | None]]:
        """``compute``, and with how many planes each expert was computed."""
        rows, lease = self._acquire(layer, index, routing_weights)
        if self._journal is not None:
            self._journal.routed(layer, index, routing_weights, lease.lookups, self._prefetcher.prediction_of(layer))
        outputs = self._slots.outputs(layer, experts, hidden, index.numel())
        num_planes: dict[int, int | None] = {}
        try:
            for arrived in lease.batches():
                ready = [(expert.expert, slot) for expert, slot in arrived]
                planes = {expert.expert: self.view_selector.num_planes(expert) for expert, _ in arrived}
                self._slots.run(layer, experts, ready, rows, hidden, outputs, planes)
                num_planes |= planes
        finally:
            lease.release()
            self._claim = None
        self._finish(layer, list(rows))
        return self._slots.combine(outputs, routing_weights.reshape(index.shape), hidden), num_planes

    def _gradients(
        self,
        layer: int,
        experts: Any,
        index: torch.Tensor,
        gradient: torch.Tensor,
        num_planes: dict[int, int | None],
        hidden: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``compute``'s result: with respect to ``hidden`` and to ``routing_weights``, from its own [num_tokens, hidden].

        By (token, choice) row and summed in routing order, as forward, so that they do not depend on the number of slots either.
        """
        with self.passing:  # backward() runs outside of the model's calls
            if self._claim is not None:  # of a forward pass that was cut short: its slots may be all there are
                self._claim[3].release()
                self._claim = None
            rows = rows_by_expert(index, self.num_experts[layer])
            weights = routing_weights.reshape(-1)
            by_row, of_weights = hidden.new_zeros(index.numel(), hidden.shape[1]), torch.zeros_like(weights)
            counts = [len(chosen) for chosen in rows.values()]
            lease = self.residency.acquire([ExpertId(layer, expert) for expert in rows], counts, len(index))
            try:
                for arrived in lease.batches():
                    for (_, expert), slot in arrived:
                        planes, chosen = num_planes[expert], torch.tensor(rows[expert])
                        by_row[chosen], of_weights[chosen] = self._slots.gradients(
                            layer, experts, expert, slot, chosen // index.shape[1], hidden, weights[chosen], gradient, planes
                        )
            finally:
                lease.release()
            wide = torch.promote_types(hidden.dtype, torch.float32)
            summed = by_row.view(*index.shape, -1).sum(1, dtype=wide).to(hidden.dtype)
            return summed.view(hidden.shape), of_weights.view(routing_weights.shape)

    def begin_step(
        self, layer: int, experts: list[int], counts: list[int], num_tokens: int, inputs: int, chosen: int, weights: int
    ) -> Any:
        """``enter`` for a step in C++, after routing: the lease on ``experts``, chosen by ``counts`` of ``num_tokens`` tokens.

        Addresses: ``inputs`` bf16 [num_tokens, hidden], ``chosen`` int64 and ``weights`` fp32 [num_tokens, top_k].
        """
        if self._claim is not None:
            self._claim[3].release()
            self._claim = None
        top_k = self._top_k[layer]
        hidden = _tensor(inputs, torch.bfloat16, num_tokens, self._hidden)
        gates, index = _tensor(weights, torch.float32, num_tokens, top_k), _tensor(chosen, torch.int64, num_tokens, top_k)
        self._in_step = experts
        if self._journal is not None:
            self._journal.entered(layer, hidden)
        self._prefetcher.entered(layer, num_tokens)
        sections = None
        if self.view_selector.policy is not None:
            rows = rows_by_expert(index, self.num_experts[layer])
            sections = self.view_selector.sections(layer, rows, gates, self._prefetcher.affordable(num_tokens))
        asked = [ExpertId(layer, expert) for expert in experts]
        lease = self.residency.acquire(asked, None if num_tokens == 1 else counts, num_tokens, sections=sections)
        if self._journal is not None:
            self._journal.routed(layer, index, gates, lease.lookups, self._prefetcher.prediction_of(layer))
        self._prefetcher.look_ahead(layer, hidden)
        return lease.native  # type: ignore[attr-defined]

    def end_step(self, layer: int, experts: list[int], num_planes: list[int]) -> None:
        """``layer`` has run ``experts``, each with so many planes (0: all)."""
        self.view_selector.count(layer, experts, num_planes)
        self._finish(layer, self._in_step)

    def _watch(self) -> None:
        """A pass begins: let a step in C++ look ahead by itself, or call ``begin_step`` and ``end_step`` if only they can do it."""
        prefetcher = self._prefetcher
        self.is_watched = self._journal is not None or self._check or self.view_selector.policy is not None
        self.is_watched |= prefetcher.prefetching and prefetcher.native is None
        watcher = "python" if self.is_watched else "native" if prefetcher.prefetching else "none"
        if watcher == self._watcher:
            return
        self._watcher, me = watcher, weakref.ref(self)  # the extension's references are not seen by the garbage collector
        if watcher == "native":
            prefetcher.native.watch(self.memory)
            return

        def begin(*args: Any) -> Any:
            runtime = me()
            assert runtime is not None
            return runtime.begin_step(*args)

        def end(*args: Any) -> None:
            runtime = me()
            assert runtime is not None
            runtime.end_step(*args)

        self.memory.watch(begin if self.is_watched else None, end if self.is_watched else None)

    def has_fused(self, layer: int, experts: Any) -> bool:
        """Whether a step in C++ may run ``layer``: all its experts have fused kernels."""
        return self._slots.has_fused(layer, experts)

    def takes_many(self, layer: int, experts: Any) -> bool:
        """Whether kernels are the way for any number of tokens of ``layer``'s experts."""
        return self._slots.takes_many(layer, experts)

    def fused(self, layer: int, experts: Any) -> tuple[list[Any], list[int], list[int]]:
        """The extension's places of ``layer``'s experts, one for each precision; their planes; and each expert's place."""
        return self._slots.fused(layer, experts)

    def cut_short(self) -> None:
        """The pass under way has failed or was interrupted: give back what it holds."""
        self._claim = None
        self.residency.forget_leases()

    def _finish(self, layer: int, chosen: Sequence[int]) -> None:
        """``layer`` has run the distinct experts ``chosen``."""
        if self._journal is not None:
            self._journal.computed()
        self._prefetcher.observe(layer, chosen)
        if self._check and layer == len(self._routers) - 1:
            self.residency.check_integrity()

    def _acquire(self, layer: int, index: torch.Tensor, weighing: Routing | torch.Tensor) -> tuple[dict[int, list[int]], Lease]:
        """The lease on the experts in ``index``: the one already held where the routing is the same, else a new one.

        ``weighing`` has their routing weights, or the scores that these come from.
        """
        if self._claim is not None:
            held_layer, held_index, rows, lease = self._claim
            if held_layer == layer and torch.equal(held_index, index):
                return rows, lease
            lease.release()  # a forward pass that was cut short, or a router whose real call differs from ours
        rows = rows_by_expert(index, self.num_experts[layer])
        counts = None if len(index) == 1 else [len(chosen) for chosen in rows.values()]
        sections = self.view_selector.sections(layer, rows, weighing, self._prefetcher.affordable(len(index)))
        lease = self.residency.acquire([ExpertId(layer, expert) for expert in rows], counts, len(index), sections=sections)
        self._claim = (layer, index, rows, lease)
        return rows, lease


def _tensor(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """What lies at ``address``, not a copy."""
    length = dtype.itemsize * shape[0] * shape[1]
    return torch.frombuffer((ctypes.c_char * length).from_address(address), dtype=dtype).view(shape)
