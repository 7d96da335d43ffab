"""A model on the CPU: dense weights and expert slots in RAM, experts read from disk."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fate_moe import switches
from fate_moe.adapter.families import linear_routers, norms_of
from fate_moe.config import OffloadConfig
from fate_moe.core import Counters, Drafts, EvictionPolicy, ExpertId, ExpertSource
from fate_moe.engine.activity import Activity
from fate_moe.engine.attach import attach, limit_context, routers_of
from fate_moe.engine.budget import Plan
from fate_moe.engine.calls import Calls
from fate_moe.engine.engine import Engine
from fate_moe.engine.patches import Patches
from fate_moe.engine.prepare import Prepared
from fate_moe.engine.report import PrefixReport, Report
from fate_moe.engine.weights import fill, leave_on_disk
from fate_moe.errors import BudgetError, ConfigError
from fate_moe.journal import Observer
from fate_moe.kernels.cpu import SlotExperts
from fate_moe.layers.cpu_step import join_layers
from fate_moe.layers.model_step import ModelStep, Pool, SequenceRows, model_step
from fate_moe.layers.modules import accelerate
from fate_moe.layers.plain import plain_decoder
from fate_moe.machine import peak_memory
from fate_moe.memory.decayed import Decayed
from fate_moe.memory.precision import make_precision_policy
from fate_moe.memory.residency import Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.memory.view_selector import ViewSelector
from fate_moe.predict.gates import FittedGates
from fate_moe.predict.predictors import Known
from fate_moe.registry import make_predictor
from fate_moe.runtime import ExpertRuntime
from fate_moe.store.dense import row_read_parameter
from fate_moe.store.learned import load_gates, load_view_losses
from fate_moe.store.open import load_dense, stored_layouts, unquantized
from fate_moe.store.reader import DiskSource

__all__ = ["CpuEngine", "CpuParts"]

_log = logging.getLogger(__name__)


class CpuEngine(Engine):
    """``model.fate`` of a model on the CPU; ``runtime`` runs its MoE blocks."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        config: OffloadConfig,
        patches: Patches,
        runtime: ExpertRuntime,
        calls: Calls,
        keep_learned: Callable[[], None],
        step: ModelStep | None = None,
        store: Path | None = None,
    ) -> None:
        """``step`` runs the whole model in one call, if one does. ``store``: where the weights are from."""
        self.step, self.store = step, store
        self.prefixes: Callable[[], PrefixReport | None] = lambda: None  # told by the scheduler
        self.model, self.plan, self.config, self.patches, self.runtime = model, plan, config, patches, runtime
        self.calls, self.drafts = calls, Drafts()
        self.end_with(runtime, runtime.residency.close, keep_learned)

    def note_model(self) -> None:
        if self.step is not None:
            self.step.note()

    def run_rows(
        self,
        tokens: Sequence[int],
        sequences: Sequence[SequenceRows],
        pool: Sequence[Pool],
        wanted: Sequence[int],
        on_pass: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Rows of several sequences with their KV cache in blocks, in a turn: see ``ModelStep.run_rows``.

        Only where ``step`` is there and ``step.is_unchanged()``.
        """
        assert self.step is not None
        with self.calls.one_pass("cpu"):
            return self.step.run_rows(tokens, sequences, pool, wanted, on_pass)

    def learn(self, kept: Sequence[int]) -> None:
        """Let the expert cache learn of the last pass's drafts that are right: the first ``kept`` of each sequence's."""
        if self.step is not None:
            with self.runtime.passing:
                self.step.learn(kept)

    def counters(self) -> Counters:
        return replace(self.runtime.residency.counters)

    def report(self) -> Report:
        runtime, plan, config = self.runtime, self.plan, self.config
        return Report(
            experts=self.counters(),
            budget_bytes=plan.budget_bytes,
            peak_bytes=peak_memory(),
            policy=config.policy_name,
            predictor=config.predictor_name,
            precision=plan.precision,
            expert_cache_bytes=plan.expert_cache_bytes,
            precision_policy=config.precision_policy,
            uses_by_bits=runtime.view_selector.by_bits(),
            prefixes=self.prefixes(),
            drafts=replace(self.drafts),
        )

    def bits_used(self) -> dict[tuple[ExpertId, int], int]:
        """How often each expert was computed with how many bits, since loading."""
        return dict(self.runtime.view_selector.used)

    def observe(self, observer: Observer) -> AbstractContextManager[None]:
        return self.runtime.observe(observer)

    def activity(self) -> Activity:
        return Activity(self.runtime.residency, self.runtime.view_selector, self.runtime.num_experts)


class CpuParts:
    """The steps of ``engine/load.py: build`` for the CPU, in the order in which they are called."""

    def __init__(self, prepared: Prepared, plan: Plan, config: OffloadConfig, patches: Patches) -> None:
        self._prepared, self._plan, self._config, self._patches = prepared, plan, config, patches
        self._model, self._stacks = prepared.model, prepared.stacks
        self.num_slots = plan.num_slots  # that the eviction policy orders
        self._residency: Residency | None = None

    def guard(self) -> AbstractContextManager[None]:
        """Around all steps."""
        return nullcontext()

    def place_weights(self) -> None:
        """Dense weights into the meta model; an embedding that is read by row stays on disk."""
        model, store, config = self._model, self._prepared.store, self._config
        layouts = stored_layouts(store, model)
        if embedding := row_read_parameter(model):
            leave_on_disk(model, embedding, store, layouts.get(embedding), self._patches)
        dense = load_dense(store, exclude=embedding, quantize=unquantized(store, model, layouts))
        fill(model, dense, store.path, layouts, config.exact_activations, self._patches)

    def make_residency(self, policy: EvictionPolicy, source: ExpertSource | None) -> None:
        """Slots, and the threads that fill them from ``source`` (None: the store's files)."""
        plan, store, config = self._plan, self._prepared.store, self._config
        self._arena = arena = SlotArena(*((one.num_slots, one.slot_bytes) for one in plan.slots))
        self._layouts = layouts = [store.manifest.layouts_of(stack.layer) for stack in self._stacks]
        blob_bytes = {ExpertId(layer, expert): one.length for layer, row in enumerate(layouts) for expert, one in enumerate(row)}
        self._policy, source = policy, source or DiskSource(store)
        try:
            self._residency = Residency(source, arena, policy, blob_bytes=blob_bytes, io_threads=config.io_threads)
        except BaseException:
            source.close()
            raise

    def make_prediction(self) -> None:
        """The predictor, with all that there is to predict from."""
        model, stacks, config, path = self._model, self._stacks, self._config, self._prepared.store.path
        self._routers = routers_of(model, stacks, self._patches)
        num_experts = [stack.num_experts for stack in stacks]
        gates = load_gates(path, num_experts, model.config.get_text_config().hidden_size)
        known = Known(
            self._routers,
            linear=linear_routers(model, stacks),
            norms=norms_of(model, stacks),
            fitted=None if gates is None else FittedGates(*gates.ahead),
            forecast=gates.forecast if gates is not None and gates.forecast else None,
            history=getattr(self._policy, "statistics", None),
        )
        top_k = max(stack.top_k for stack in stacks)
        self._predictor = make_predictor(config.predictor_name, num_experts, top_k, known, config.look_ahead)

    def patch(self) -> None:
        """MoE blocks run through the runtime, plain layers and modules through the extension."""
        model, stacks, config, patches, plan = self._model, self._stacks, self._config, self._patches, self._plan
        assert self._residency is not None
        shapes = [stack.output_rows_first() for stack in stacks]
        slots = SlotExperts(self._arena.buffer, self._arena.offsets, self._layouts, shapes, exact=config.exact_activations)
        losses = load_view_losses(self._prepared.store.path)
        precision = make_precision_policy(config.precision_policy, losses)
        self.runtime = ExpertRuntime(
            self._residency,
            self._predictor,
            self._routers,
            slots,
            num_experts=[stack.num_experts for stack in stacks],
            view_selector=ViewSelector(precision, self._layouts, self._residency),
            top_k=[stack.top_k for stack in stacks],
            look_ahead=config.look_ahead,
            check=switches.check_each_pass(),
        )
        accelerated: Counter[str] = accelerate(model, config.exact_activations, patches)
        attach(model, stacks, self.runtime, patches)
        joined = join_layers(model, stacks, self.runtime, config.exact_activations, config.kv_cache, patches)
        self._step = model_step(model, joined)
        if self._step is not None:
            patches.replace(model, "forward", self._step)
        modules = ", ".join(f"{count} {kind}" for kind, count in accelerated.items()) or "no modules"
        _log.info("run by the extension: %d of %d layers whole, %s", len(joined), len(plain_decoder(model)), modules)
        in_pieces = self._step is not None and self._step.most_rows == sys.maxsize
        if plan.rows_at_once < plan.context_length and not in_pieces:
            raise BudgetError(
                f"memory is set aside for {plan.rows_at_once} tokens of a prompt at once, and no kernel reads this model's prompts "
                f"so (-v says why); give --context-length {plan.rows_at_once}",
                0,
            )
        if self._step is not None:
            self._step.most_whole = plan.rows_at_once
        if config.kv_cache != "bf16" and self._step is None:
            raise ConfigError(
                f"the KV cache of {model.config.model_type} is bf16: not all of its layers are run by the extension (fate models "
                "lists the families); omit kv_cache"
            )
        limit_context(model, plan.context_length, plan.kv_cache_bytes // plan.context_length, patches, config.kv_cache)

    def engine(self, keep_learned: Callable[[], None]) -> CpuEngine:
        """What becomes ``model.fate``."""
        calls = Calls(self.runtime.passing, self.runtime.cut_short)
        return CpuEngine(
            self._model,
            self._plan,
            self._config,
            self._patches,
            self.runtime,
            calls,
            keep_learned,
            self._step,
            self._prepared.store.path,
        )

    def preload(self) -> None:
        """Fill the slots with what earlier runs used most, in the background, until the first pass begins."""
        if isinstance(self._policy, Decayed):
            self.runtime.preload(self._policy.hottest(self._plan.num_slots))

    def abandon(self) -> None:
        """A step failed: stop what earlier ones started."""
        if self._residency is not None:
            self._residency.close()
