"""From a name to a running model, in one function for both devices: plan, weights, residency, prediction, patches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import AutoTokenizer, GenerationConfig

from fate_moe import demo
from fate_moe.adapter.families import linear_routers, norms_of
from fate_moe.adapter.meta_model import ExpertStack, build_meta_model, expert_stacks
from fate_moe.checkpoints.gguf import config_folder, open_checkpoint
from fate_moe.checkpoints.source import resolve_checkpoint
from fate_moe.config import OffloadConfig, cache_home
from fate_moe.core import EvictionPolicy, ExpertId, ExpertSource, Predictor, Router
from fate_moe.engine.attach import attach, limit_context, routers_of
from fate_moe.engine.budget import Footprint, Plan, footprint, make_plan
from fate_moe.engine.device_budget import DevicePlan, make_device_plan
from fate_moe.engine.patches import Patches
from fate_moe.engine.report import Report
from fate_moe.engine.weights import fill, leave_on_disk
from fate_moe.errors import CheckpointError, ConfigError, StoreError
from fate_moe.gpu.device import find_gpu
from fate_moe.memory.decayed import Decayed
from fate_moe.registry import make_policy
from fate_moe.store.home import store_used
from fate_moe.store.learned import load_statistics, save_statistics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["build", "load"]

_log = logging.getLogger(__name__)


def load(model: str | Path | None = None, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers model whose experts stream from disk, and its tokenizer.

    ``model`` is a store, a Hugging Face checkpoint folder, a GGUF file or a hub id (converted on first use into ``$FATE_HOME``);
    None is the embedded model. ``options`` are the fields of OffloadConfig. The model has ``generate()`` and all else that
    transformers gives it; ``model.fate`` is its Engine. Raises FateError and its children, each with a sentence on what to do.
    """
    config = OffloadConfig.from_options(options)
    if config.on_gpu:
        find_gpu()  # before anything is converted
    prepared = prepare(store_for(model, config.precision, config.dense_precision))
    return build(prepared, prepared.plan(config), config), load_tokenizer(prepared.store.path)


class Parts(Protocol):
    """One device's way to do the steps of ``build``, which calls them in this order."""

    num_slots: int

    def guard(self) -> AbstractContextManager[None]: ...

    def place_weights(self) -> None: ...

    def make_residency(self, policy: EvictionPolicy, source: ExpertSource | None) -> None: ...

    def make_prediction(self) -> None: ...

    def patch(self) -> None: ...

    def engine(self, keep_learned: Callable[[], None]) -> Engine: ...

    def abandon(self) -> None: ...


def build(
    prepared: Prepared,
    plan: Plan | DevicePlan,
    config: OffloadConfig,
    source: ExpertSource | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Make ``prepared``'s model run under ``plan``; the meta model becomes the model.

    ``source`` brings the experts' bytes; None: the store's files. ``device`` of a DevicePlan: None is this machine's GPU, a CPU
    simulates one under Triton's interpreter. Raises UnsupportedModelError for experts that the device cannot run, BudgetError if a
    GPU has less memory than the plan says. Whatever is raised, nothing stays started and the model is as it was.
    """
    # Plan: each device has its own parts; the order of steps is the same.
    model, path = prepared.model, prepared.store.path
    patches = Patches(model)
    parts = _parts(prepared, plan, config, patches, device)
    try:
        with parts.guard():
            # Weights: everything that stays resident.
            parts.place_weights()
            load_generation_config(model, path)

            # Residency: who has a slot, ordered by a policy that goes on from what earlier runs learned.
            policy = make_policy(config.policy_name, parts.num_slots, [stack.num_experts for stack in prepared.stacks])
            _recall(policy, path)
            parts.make_residency(policy, source)

            # Prediction: what is read ahead.
            parts.make_prediction()

            # Patches: the model's experts, layers and limits become ours.
            parts.patch()
            engine = parts.engine(lambda: _keep_learned(policy, path))
            patches.replace(model, "fate", engine)
            store_used(path)
    except BaseException:
        parts.abandon()
        patches.undo()
        raise
    return model  # type: ignore[no-any-return]


def _parts(
    prepared: Prepared, plan: Plan | DevicePlan, config: OffloadConfig, patches: Patches, device: torch.device | None
) -> Parts:
    if isinstance(plan, Plan):
        return CpuParts(prepared, plan, config, patches)
    from fate_moe.engine.cuda import CudaParts  # imports Triton

    return CudaParts(prepared, plan, config, patches, device)


def realize(prepared: Prepared, plan: Plan | DevicePlan, config: OffloadConfig, source: ExpertSource | None = None) -> Any:
    """Load the dense weights into the meta_model and attach the runtime under ``plan``; the meta_model becomes the model.

    ``source`` brings the experts' bytes on the CPU; None: the store's files.
    """
    if isinstance(plan, DevicePlan):
        from fate_moe.engine.cuda import realize_on_device

        return realize_on_device(prepared, plan, config)
    store, model, stacks = prepared.store, prepared.model, prepared.stacks
    layouts_of_dense = dense_layouts(model, store.manifest.dense_precision)
    if embedding := read_by_row(model):
        leave_on_disk(model, embedding, store, layouts_of_dense.get(embedding))
    fill(model, load_dense(store, but=embedding), store.path, layouts_of_dense, config.exact_activations)
    load_generation_config(model, store.path)
    num_experts = [stack.num_experts for stack in stacks]
    arena = SlotArena(*((of.num_slots, of.slot_bytes) for of in plan.slots))
    policy = make_policy(config.policy_name, plan.num_slots, num_experts)
    recall(policy, store.path)
    shapes = [stack.output_rows_first() for stack in stacks]
    layouts = [store.manifest.layouts_of(stack.layer) for stack in stacks]
    blob_bytes = {ExpertId(layer, expert): of.length for layer, row in enumerate(layouts) for expert, of in enumerate(row)}
    residency = Residency(source or DiskSource(store), arena, policy, blob_bytes=blob_bytes, io_threads=config.io_threads)
    slots = SlotExperts(arena.buffer, arena.offsets, layouts, shapes, exact=config.exact_activations)
    patches = Patches(model)
    accelerated = accelerate(model, config.exact_activations, patches)
    routers = routers_of(model, stacks, patches)
    predictor = _predictor(config, prepared, routers, policy)
    view_selector = ViewSelector(make_precision_policy(config.precision_policy, load_view_losses(store.path)), layouts, residency)
    runtime = ExpertRuntime(
        residency, predictor, routers, slots, num_experts=num_experts, view_selector=view_selector, look_ahead=config.look_ahead
    )
    attach(model, stacks, runtime)
    joined = join_layers(model, stacks, runtime, config.exact_activations, patches)
    _log.info(
        "run by the extension, a token at a time: %d of %d layers whole, %s", joined, len(stacks), dict(accelerated) or "no module"
    )
    limit_context(model, plan.context_length, plan.kv_cache_bytes // plan.context_length)
    model.fate = Fate(plan, config, runtime, lambda: remember(policy, store.path))
    return model


def load_generation_config(model: Any, store: Path) -> None:
    """The store's generation_config.json, if it has one. Raises StoreError where it cannot be read."""
    if (path := store / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(store)
        except Exception as error:  # whatever a torn or hostile file makes transformers raise
            raise StoreError(f"{path} cannot be read ({_first_line(error)}); copy it from the checkpoint again") from error


def _predictor(config: OffloadConfig, prepared: Prepared, routers: list[Router | None], policy: EvictionPolicy) -> Predictor:
    """The predictor that ``config`` names, with all that there is to predict from."""
    model, stacks = prepared.model, prepared.stacks
    num_experts = [stack.num_experts for stack in stacks]
    gates = load_gates(prepared.store.path, num_experts, model.config.get_text_config().hidden_size)
    known = Known(
        routers,
        linear=linear_routers(model, stacks),
        norms=norms_of(model, stacks),
        fitted=None if gates is None else FittedGates(*gates.ahead),
        forecast=gates.forecast if gates is not None and gates.forecast else None,
        history=getattr(policy, "statistics", None),
    )
    return make_predictor(config.predictor_name, num_experts, max(stack.top_k for stack in stacks), known, config.look_ahead)


def recall(policy: EvictionPolicy, store: Path) -> None:
    """Warm start: go on from what earlier runs learned of the routing."""
    if isinstance(policy, Decayed) and (state := load_statistics(store)) is not None:
        try:
            policy.restore(state)
        except ConfigError as error:
            _log.warning("%s: %s", store, error)


def _keep_learned(policy: EvictionPolicy, store: Path) -> None:
    """Keep for later runs what ``policy`` learned."""
    if isinstance(policy, Decayed):
        save_statistics(store, policy.state())
