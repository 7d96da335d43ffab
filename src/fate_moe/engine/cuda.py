"""A store's model on a GPU: dense weights and slots in VRAM, experts in pinned memory, the disk behind."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fate_moe.adapter.meta_model import ExpertStack
from fate_moe.config import OffloadConfig
from fate_moe.core import PrecisionPolicy
from fate_moe.engine.attach import limit_context
from fate_moe.engine.cuda_attach import attach_device, router_weights
from fate_moe.engine.cuda_decode import CapturedDecode
from fate_moe.engine.device_budget import VRAM_RESERVE_BYTES, DevicePlan
from fate_moe.engine.report import Report
from fate_moe.engine.weights import fill_device
from fate_moe.errors import BudgetError, UnsupportedModelError
from fate_moe.gpu.device import CONTEXT_BYTES, find_gpu, vram_peak
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.host import DiskBelow, HostTier, WholeHost, read_all
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.layout import DeviceLayout, device_layout
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.options import DeviceOptions, device_options
from fate_moe.gpu.prefetch_trial import run_prefetch_trial
from fate_moe.gpu.tables import ResidencyTables, layer_quotas
from fate_moe.io.progress import progress_bar
from fate_moe.layers.plain import cuda_reasons, plain_layers
from fate_moe.memory.policies import make_policy
from fate_moe.memory.precision import make_precision_policy
from fate_moe.memory.residency import Residency
from fate_moe.store.dense import dense_layouts
from fate_moe.store.learned import load_gates, load_view_losses
from fate_moe.store.open import load_dense
from fate_moe.store.reader import DiskSource

if TYPE_CHECKING:
    from fate_moe.engine.load import Prepared

__all__ = ["DeviceFate", "realize_on_device"]

_log = logging.getLogger(__name__)


class DeviceFate:
    """What ``model.fate`` is on a GPU: the plan the model was loaded under, the options, and what has happened since."""

    def __init__(
        self,
        plan: DevicePlan,
        config: OffloadConfig,
        experts: DeviceExperts,
        decode: CapturedDecode | None,
        keep: Callable[[], None],
    ) -> None:
        self.plan, self.config, self.experts, self.decode = plan, config, experts, decode
        self._keep = keep

    def report(self) -> Report:
        """Everything since loading: lookups in VRAM, bytes to it and from disk, memory. Waits for the device."""
        experts = self.experts
        disk = experts.host.counters() if self.plan.reads_disk else None
        ahead = "" if experts.options.limit else ", nothing copied ahead"
        return Report.on_device(
            experts.counters(), disk, experts.tables.hosted(), self.plan, self.config, ahead, vram_peak(experts.pool.bytes.device)
        )

    def close(self) -> None:
        """Give host memory back, close the store's files, keep what was learned. The model cannot run afterwards."""
        self.experts.counters()  # the device has ended its work: nothing reads host memory any more
        self.experts.close()
        self._keep()


def realize_on_device(prepared: Prepared, plan: DevicePlan, config: OffloadConfig, device: torch.device | None = None) -> Any:
    """As ``load.realize``; ``device`` None is this machine's GPU, a CPU simulates one under Triton's interpreter.

    Raises UnsupportedModelError for experts that the kernels cannot read, BudgetError if the GPU has less than the plan says.
    """
    try:
        return _realize(prepared, plan, config, device)
    except torch.OutOfMemoryError as error:
        raise _ran_out(plan, "loading") from error


def _ran_out(plan: DevicePlan, while_doing: str) -> BudgetError:
    enough = plan.vram_budget_bytes + VRAM_RESERVE_BYTES
    return BudgetError(
        f"the GPU's memory ran out while {while_doing}, against the plan; give --vram {-(-enough >> 20)}MiB, or end what else runs",
        enough,
    )


def _realize(prepared: Prepared, plan: DevicePlan, config: OffloadConfig, device: torch.device | None) -> Any:
    from fate_moe.engine.load import load_generation_config, recall, remember

    device = device or find_gpu().device
    store, model, stacks = prepared.store, prepared.model, prepared.stacks
    layouts, reasons = _layouts(prepared), cuda_reasons(model, plain_layers(model))
    if plan.host_compute and reasons:
        why = f"the CPU computes misses of fused steps alone, and {'; '.join(reasons)}"
        if config.host_compute != "auto":
            raise UnsupportedModelError(f"{why}; leave --host-compute away")
        _log.warning("%s: it computes none", why)
        plan = replace(plan, host_compute=0.0)
    if config.preset == "eap" and reasons:
        raise UnsupportedModelError(
            f"--preset eap needs a fused step on a GPU, and {'; '.join(reasons)}; choose --preset best, fate or load-on-demand"
        )
    if device.type == "cuda":  # the promise is kept by torch: it fails rather than take more
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (plan.vram_budget_bytes - CONTEXT_BYTES) / total), device)
    fill_device(model, load_dense(store), store.path, dense_layouts(model, store.manifest.dense_precision), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the blobs took on their way
    load_generation_config(model, store.path)
    options = replace(device_options(config.preset), host_compute=plan.host_compute)
    num_experts, top_k = stacks[0].num_experts, max(stack.top_k for stack in stacks)
    source, arena = DiskSource(store), PinnedArena(plan.num_host_slots, plan.slot_bytes, device)
    policy = make_policy(config.policy_name, plan.num_host_slots, [num_experts] * len(stacks))
    recall(policy, store.path)
    host: HostTier
    if plan.reads_disk:
        options = replace(options, limit=0)  # what would be copied ahead may have to be read first
        residency = Residency(source, arena.slots, policy, io_threads=config.io_threads)
        host = DiskBelow(residency, arena, num_experts, device)
    else:
        with progress_bar("loading experts", store.manifest.expert_bytes, None) as advance:
            read_all(source, arena, len(stacks), num_experts, config.io_threads, advance)
        source.close()
        host = WholeHost(arena)
    precision = make_precision_policy(config.precision_policy, load_view_losses(store.path))
    share = _host_compute(prepared, arena, top_k, device, config) if plan.host_compute else None
    hidden = model.config.get_text_config().hidden_size
    learned = load_gates(store.path, [num_experts] * len(stacks), hidden) if options.limit and not reasons else None
    fitted = [] if learned is None else [None, *learned.ahead[0][1:]]  # nothing comes early to the first layer
    gates = router_weights(model, stacks)
    experts = _experts(plan, layouts, host, gates, num_experts, top_k, options, share, precision, fitted, device)
    attach_device(model, stacks, experts)
    model.register_forward_hook(lambda module, args, output: host.check())
    decode, per_token = None, plan.kv_cache_bytes // plan.context_length
    if reasons:
        _log.info("decode runs transformers' layers: %s", "; ".join(reasons))
        limit_context(model, plan.context_length, per_token)
    else:
        decode = CapturedDecode(model, experts, plan.context_length, per_token, config.cuda_graph, config.preset == "eap")
    _settle(model, experts, decode, device)
    experts.tables.counters.zero_()
    model.generate = _with_inputs_on(device, model.generate, plan)
    model.fate = DeviceFate(plan, config, experts, decode, lambda: remember(policy, store.path) if plan.reads_disk else None)
    return model


def _settle(model: Any, experts: DeviceExperts, decode: CapturedDecode | None, device: torch.device) -> None:
    """Find out whether copying ahead pays here (law 3), and record the decode step."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        if decode is not None:
            run_prefetch_trial(experts, decode.record, decode.one_token)
        else:
            run_prefetch_trial(experts, lambda: None, lambda: model(token))
    _log.info("copied ahead: at most %d experts a layer", experts.options.limit)


def _host_compute(prepared: Prepared, arena: PinnedArena, top_k: int, device: torch.device, config: OffloadConfig) -> HostCompute:
    """Threads that compute misses. Raises UnsupportedModelError where they cannot compute these experts."""
    stack = prepared.stacks[0]
    layout, module = prepared.store.manifest.layouts[0], prepared.model.get_submodule(stack.name)
    shapes = stack.output_rows_first()
    return HostCompute(layout, shapes, module, arena, top_k, device, exact=config.exact_activations)


def _experts(
    plan: DevicePlan,
    layouts: Sequence[DeviceLayout],
    host: HostTier,
    gates: Sequence[torch.Tensor | None],
    num_experts: int,
    top_k: int,
    options: DeviceOptions,
    share: HostCompute | None,
    precision: PrecisionPolicy | None,
    fitted: Sequence[torch.Tensor | None],
    device: torch.device,
) -> DeviceExperts:
    """Slots in VRAM, filled."""
    quotas = layer_quotas(plan.num_slots, len(layouts), num_experts, min(num_experts, top_k + options.limit), options.num_whole)
    tables = ResidencyTables(quotas, num_experts, device)
    pool = VramPool(tables.num_slots, plan.num_staging, plan.slot_bytes, device)
    experts = DeviceExperts(
        layouts, host, pool, tables, gates, top_k=top_k, options=options, share=share, precision=precision, fitted=fitted
    )
    experts.fill()
    host.check()
    return experts


def _layouts(prepared: Prepared) -> list[DeviceLayout]:
    """Each layer's experts as the kernels see them. Raises UnsupportedModelError, saying why, where they cannot."""
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
    return [_layout(prepared, stack) for stack in stacks]


def _layout(prepared: Prepared, stack: ExpertStack) -> DeviceLayout:
    module = prepared.model.get_submodule(stack.name)
    return device_layout(prepared.store.manifest.layouts[0], stack.output_rows_first(), module)


def _with_inputs_on(device: torch.device, generate: Callable[..., Any], plan: DevicePlan) -> Callable[..., Any]:
    """``generate`` with its tensors moved to ``device`` first; raises BudgetError where that has too little memory after all."""

    @functools.wraps(generate)
    def moved(*args: Any, **options: Any) -> Any:
        there = [value.to(device) if isinstance(value, torch.Tensor) else value for value in args]
        named = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        try:
            return generate(*there, **named)
        except torch.OutOfMemoryError as error:
            raise _ran_out(plan, "generating") from error

    return moved
