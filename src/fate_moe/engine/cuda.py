"""A model on a GPU: dense weights and slots in VRAM, experts in pinned memory, the disk behind."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fate_moe import switches
from fate_moe.config import OffloadConfig
from fate_moe.core import Counters, EvictionPolicy, ExpertSource
from fate_moe.engine.attach import limit_context
from fate_moe.engine.calls import Calls
from fate_moe.engine.cuda_attach import attach_device, router_weights
from fate_moe.engine.cuda_decode import CapturedDecode
from fate_moe.engine.device_budget import VRAM_RESERVE_BYTES, DevicePlan
from fate_moe.engine.engine import Engine
from fate_moe.engine.patches import Patches
from fate_moe.engine.prepare import Prepared
from fate_moe.engine.report import Report
from fate_moe.engine.weights import fill_device
from fate_moe.errors import BudgetError, ConfigError, UnsupportedModelError
from fate_moe.gpu.device import CONTEXT_BYTES, find_gpu, vram_peak
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.host import DiskBelow, HostTier, WholeHost, read_all
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.host_trial import run_host_trial
from fate_moe.gpu.layout import DeviceLayout, device_layout
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.prefetch_trial import run_prefetch_trial
from fate_moe.gpu.state import MAX_DECODE_TOKENS, DeviceState
from fate_moe.gpu.tables import ResidencyTables, layer_quotas
from fate_moe.io.progress import progress_bar
from fate_moe.journal import Observer
from fate_moe.layers.reasons import cuda_reasons
from fate_moe.machine import peak_memory
from fate_moe.memory.precision import make_precision_policy
from fate_moe.memory.residency import Residency
from fate_moe.registry import PRESETS
from fate_moe.store.learned import load_gates, load_view_losses
from fate_moe.store.open import load_dense, stored_layouts, unquantized
from fate_moe.store.reader import DiskSource

__all__ = ["CudaEngine", "CudaParts"]

_log = logging.getLogger(__name__)


class CudaEngine(Engine):
    """``model.fate`` of a model on a GPU; ``experts`` runs its MoE blocks, ``decode`` its captured step, where it has one."""

    def __init__(
        self,
        model: Any,
        plan: DevicePlan,
        config: OffloadConfig,
        patches: Patches,
        experts: DeviceExperts,
        decode: CapturedDecode | None,
        calls: Calls,
        keep_learned: Callable[[], None],
    ) -> None:
        self.model, self.plan, self.config, self.patches = model, plan, config, patches
        self.experts, self.decode, self.calls = experts, decode, calls
        self.end_with(experts, partial(_stop, experts.state), keep_learned)
        self._last_report: Report | None = None  # of a closed engine

    def counters(self) -> Counters:
        """As ``Engine.counters``; waits for the device."""
        return self.experts.state.counters() if self._last_report is None else self._last_report.experts

    def report(self) -> Report:
        """As ``Engine.report``; waits for the device."""
        if self._last_report is not None:
            return self._last_report
        state, plan, config = self.experts.state, self.plan, self.config
        ahead = "" if state.options.limit else ", nothing copied ahead"
        return Report(
            experts=self.counters(),
            budget_bytes=plan.budget_bytes,
            peak_bytes=peak_memory(),
            policy=config.policy_name if plan.reads_disk else "all in RAM",
            predictor=f"preset {config.preset}{ahead}",
            precision=plan.precision,
            expert_cache_bytes=plan.expert_cache_bytes,
            precision_policy=config.precision_policy,
            vram_budget_bytes=plan.vram_budget_bytes,
            vram_peak_bytes=vram_peak(state.device),
            disk=replace(state.host.counters()) if plan.reads_disk else None,
            host_compute=state.hosted_most / state.top_k,
            num_hosted=state.tables.hosted(),
        )

    def observe(self, observer: Observer) -> AbstractContextManager[None]:
        raise ConfigError("passes on a GPU cannot be observed; omit vram and device to observe them on the CPU")

    def note_model(self) -> None:
        if self.decode is not None:
            self.decode.note_model()

    def keep_report(self) -> None:
        self._last_report = self.report()


class CudaParts:
    """The steps of ``engine/load.py: build`` for a GPU, in the order in which they are called."""

    def __init__(
        self, prepared: Prepared, plan: DevicePlan, config: OffloadConfig, patches: Patches, device: torch.device | None
    ) -> None:
        """Raises UnsupportedModelError, saying why, for a model or an option that the GPU tier cannot run."""
        self._prepared, self._config, self._patches = prepared, config, patches
        self._model, self._stacks = prepared.model, prepared.stacks
        self._device = device or find_gpu().device
        self._layouts = _layouts(prepared)
        self._reasons = cuda_reasons(prepared.model)
        self._plan = plan = _with_host_compute(plan, prepared, self._reasons)
        if PRESETS[config.preset].device.activation_path and self._reasons:
            why = "; ".join(self._reasons)
            raise UnsupportedModelError(
                f"--preset {config.preset} needs a fused step on a GPU, and {why}; choose --preset best, fate or load-on-demand"
            )
        self._num_experts, self._top_k = self._stacks[0].num_experts, max(stack.top_k for stack in self._stacks)
        self._options = replace(PRESETS[config.preset].device, host_compute=plan.host_compute)
        self.num_slots = plan.num_host_slots  # that the eviction policy orders
        self._host: HostTier | None = None
        self._experts: DeviceExperts | None = None

    def guard(self) -> AbstractContextManager[None]:
        """Around all steps: what the GPU's memory running out means."""
        return _memory_of(self._plan, "loading")

    def place_weights(self) -> None:
        """Dense weights to the GPU, within the budget."""
        device, store = self._device, self._prepared.store
        if device.type == "cuda":  # torch keeps the promise: it fails rather than take more
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (self._plan.vram_budget_bytes - CONTEXT_BYTES) / total), device)
        layouts = stored_layouts(store, self._model)
        dense = load_dense(store, quantize=unquantized(store, self._model, layouts))
        fill_device(self._model, dense, store.path, layouts, device, self._patches)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the blobs took on their way

    def make_residency(self, policy: EvictionPolicy, source: ExpertSource | None) -> None:
        """Pinned slots in RAM: all experts, or as many as fit with the disk behind."""
        plan, config, store = self._plan, self._config, self._prepared.store
        source = source or DiskSource(store)
        self._arena = arena = PinnedArena(plan.num_host_slots, plan.slot_bytes, self._device)
        if plan.reads_disk:
            self._options = replace(self._options, limit=0)  # what would be copied ahead may have to be read first
            residency = Residency(source, arena.slots, policy, io_threads=config.io_threads)
            self._host = DiskBelow(residency, arena, self._num_experts, self._device)
            return
        with progress_bar("loading experts", store.manifest.expert_bytes, None) as advance:
            read_all(source, arena, len(self._stacks), self._num_experts, config.io_threads, advance)
        source.close()
        self._host = WholeHost(arena)

    def make_prediction(self) -> None:
        """Routers that can be applied one layer early, and the gates of ``fate fit`` for a fused step."""
        path, hidden = self._prepared.store.path, self._model.config.get_text_config().hidden_size
        wanted = self._options.limit and not self._reasons
        learned = load_gates(path, [self._num_experts] * len(self._stacks), hidden) if wanted else None
        self._fitted: list[torch.Tensor | None] = [] if learned is None else [None, *learned.ahead[0][1:]]  # none before layer 0
        self._routers = router_weights(self._model, self._stacks)

    def patch(self) -> None:
        """Slots in VRAM, filled; MoE blocks through them; the captured step where layers are plain."""
        model, plan, config, patches, device = self._model, self._plan, self._config, self._patches, self._device
        assert self._host is not None
        host = self._host
        self._experts = experts = self._make_experts(host)
        attach_device(model, self._stacks, experts, patches)

        check_tables = switches.check_each_pass()

        def check(module: Any, args: Any, output: Any) -> None:
            host.check()
            if check_tables:
                experts.state.tables.check_integrity()

        patches.hook(model, "after", check)
        self._decode, per_token = None, plan.kv_cache_bytes // plan.context_length
        if self._reasons:
            _log.info("decode runs transformers' layers: %s", "; ".join(self._reasons))
            limit_context(model, plan.context_length, per_token, patches)
        else:
            paths = self._options.activation_path
            self._decode = CapturedDecode(model, experts, plan.context_length, per_token, config.cuda_graph, patches, paths=paths)
        run_host_trial(experts)
        self._try_prefetch(experts)
        experts.state.tables.counters.zero_()
        patches.replace(model, "generate", _with_inputs_on(device, model.generate, plan))

    def engine(self, keep_learned: Callable[[], None]) -> CudaEngine:
        """What becomes ``model.fate``. Statistics are kept only where the host tier used them."""
        assert self._experts is not None
        keep = keep_learned if self._plan.reads_disk else lambda: None
        return CudaEngine(self._model, self._plan, self._config, self._patches, self._experts, self._decode, Calls(), keep)

    def preload(self) -> None:
        """Nothing: a card's first prompt fills its slots by the gigabyte a second."""

    def abandon(self) -> None:
        """A step failed: stop what earlier ones started."""
        if self._experts is not None:
            self._experts.state.close()
        elif self._host is not None:
            self._host.close()

    def _make_experts(self, host: HostTier) -> DeviceExperts:
        plan, options, num_layers = self._plan, self._options, len(self._layouts)
        fewest = min(self._num_experts, self._top_k + options.limit)
        quotas = layer_quotas(plan.num_slots, num_layers, self._num_experts, fewest, options.num_whole)
        tables = ResidencyTables(quotas, self._num_experts, self._device)
        pool = VramPool(tables.num_slots, plan.num_staging, plan.slot_bytes, self._device)
        losses = load_view_losses(self._prepared.store.path)
        state = DeviceState(
            self._layouts,
            host,
            pool,
            tables,
            self._routers,
            top_k=self._top_k,
            options=options,
            host_compute=self._host_compute() if plan.host_compute != 0 else None,
            precision=make_precision_policy(self._config.precision_policy, losses),
            fitted=self._fitted,
        )
        state.fill()
        host.check()
        return DeviceExperts(state)

    def _host_compute(self) -> HostCompute | None:
        """Threads that compute misses. Where they cannot compute these experts None, or UnsupportedModelError if they were asked
        for by number."""
        stack, manifest = self._stacks[0], self._prepared.store.manifest
        module, shapes = self._model.get_submodule(stack.name), stack.output_rows_first()
        try:
            return HostCompute(
                manifest.layouts[0], shapes, module, self._arena, self._top_k, self._device, tokens=MAX_DECODE_TOKENS
            )
        except UnsupportedModelError as reason:
            if self._plan.host_compute is not None:
                raise
            _log.info("%s", reason)
            return None

    def _try_prefetch(self, experts: DeviceExperts) -> None:
        """Time copies and steps, turn copying ahead off where it cannot pay, and record the decode step."""
        token, decode, model = torch.zeros(1, 1, dtype=torch.int64, device=self._device), self._decode, self._model
        with torch.no_grad():
            if decode is not None:
                run_prefetch_trial(experts, decode.record, decode.one_token)
            else:
                run_prefetch_trial(experts, lambda: None, lambda: model(token))
        _log.info("copied ahead: at most %d experts a layer", experts.state.options.limit)


def _with_host_compute(plan: DevicePlan, prepared: Prepared, reasons: Sequence[str]) -> DevicePlan:
    """``plan``, without host compute where it cannot help, or changes the text and was not asked for by number.

    ``reasons``: why there is no fused step. Raises UnsupportedModelError if it was asked for by number and there is none.
    """
    if plan.host_compute == 0 or (plan.host_compute is not None and not reasons):
        return plan
    why = f"the CPU computes misses of fused steps only, and {'; '.join(reasons)}" if reasons else ""
    if plan.host_compute is not None:
        raise UnsupportedModelError(f"{why}; omit --host-compute")
    if prepared.store.manifest.layouts[0].precision == "lossless":
        why = "the CPU adds the products of unquantized experts in another order"
    if plan.num_slots == plan.num_experts:
        why = "every expert is in VRAM"
    if not why:
        return plan
    _log.info("the CPU computes no experts: %s", why)
    return replace(plan, host_compute=0.0)


def _layouts(prepared: Prepared) -> list[DeviceLayout]:
    """Each layer's experts as the kernels see them. Raises UnsupportedModelError, saying why, where they cannot read them."""
    manifest, stacks = prepared.store.manifest, prepared.stacks
    reasons = []
    if len({stack.num_experts for stack in stacks}) > 1:
        reasons.append("layers have different numbers of experts")
    if len(manifest.layouts) > 1:
        reasons.append("experts are stored in different precisions")
    if any(stack.twins for stack in stacks):
        reasons.append("several modules share their experts")
    if reasons:
        raise UnsupportedModelError(f"the GPU tier cannot run this model: {'; '.join(reasons)}; run it on the CPU, without --vram")
    return [
        device_layout(manifest.layouts[0], stack.output_rows_first(), prepared.model.get_submodule(stack.name)) for stack in stacks
    ]


def _stop(state: DeviceState) -> None:
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)  # what was enqueued reads host memory
    state.close()


@contextmanager
def _memory_of(plan: DevicePlan, activity: str) -> Iterator[None]:
    """Raise BudgetError where the GPU's memory runs out within."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        enough = plan.vram_budget_bytes + VRAM_RESERVE_BYTES
        raise BudgetError(
            f"the GPU's memory ran out while {activity}, although the plan fitted; give --vram {-(-enough >> 20)}MiB, or end other "
            "programs that use the GPU",
            enough,
        ) from error


def _with_inputs_on(device: torch.device, generate: Callable[..., Any], plan: DevicePlan) -> Callable[..., Any]:
    """``generate`` with its tensors moved to ``device`` first; raises BudgetError where that has too little memory after all."""

    @functools.wraps(generate)
    def moved(*args: Any, **options: Any) -> Any:
        there = [value.to(device) if isinstance(value, torch.Tensor) else value for value in args]
        named = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        with _memory_of(plan, "generating"):
            return generate(*there, **named)

    return moved
