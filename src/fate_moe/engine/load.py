"""From a name to a running model: find the checkpoint, convert it once, plan, load the dense weights, attach the runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from fate_moe.gpu.options import device_options
from fate_moe.kernels.cpu import SlotExperts
from fate_moe.layers.cpu_step import join_layers
from fate_moe.layers.modules import accelerate
from fate_moe.memory.decayed import Decayed
from fate_moe.memory.policies import make_policy
from fate_moe.memory.precision import make_precision_policy
from fate_moe.memory.residency import Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.memory.view_selector import ViewSelector
from fate_moe.predict.gates import FittedGates
from fate_moe.predict.predictors import Known, make_predictor
from fate_moe.runtime import ExpertRuntime
from fate_moe.store.convert import convert
from fate_moe.store.dense import default_dense_precision, dense_layouts, read_by_row
from fate_moe.store.format import blob_layout
from fate_moe.store.learned import gates_bytes, load_gates, load_statistics, load_view_losses, save_statistics
from fate_moe.store.open import Store, load_dense, open_store
from fate_moe.store.plan import identity_of
from fate_moe.store.reader import DiskSource

__all__ = ["Fate", "Prepared", "load", "load_tokenizer", "plan", "prepare", "realize", "store_for"]

_log = logging.getLogger(__name__)

_AGAIN = "delete the store and convert the checkpoint again"


class Fate:
    """What ``model.fate`` is: the plan the model was loaded under, the options, and what has happened since."""

    def __init__(self, plan: Plan, config: OffloadConfig, runtime: ExpertRuntime, keep: Callable[[], None]) -> None:
        self.plan = plan
        self.config = config
        self.runtime = runtime
        self._keep = keep

    def report(self) -> Report:
        """Everything since loading: lookups, bytes, stall seconds, memory."""
        return Report.of(self.runtime.residency.counters, self.plan, self.config, self.runtime.view_selector.by_bits())

    def bits_used(self) -> dict[tuple[ExpertId, int], int]:
        """How often each expert was computed with how many bits, since loading."""
        return dict(self.runtime.view_selector.used)

    def close(self) -> None:
        """Stop the reading threads, close the store's files, keep what was learned. The model cannot run afterwards."""
        self.runtime.close()
        self._keep()


@dataclass(frozen=True)
class Prepared:
    """A store that is whole and the meta_model of its model: enough to plan with, nothing loaded yet."""

    store: Store
    model: Any
    stacks: list[ExpertStack]

    def footprint(self) -> Footprint:
        needs = footprint(self.model, self.stacks, self.store.manifest.precision, self.store.manifest)
        gates = gates_bytes(self.store.path, self.model.config.get_text_config().hidden_size)
        # On a GPU each lies below another copy of its layer's router.
        return replace(needs, dense_bytes=needs.dense_bytes + gates, device_bytes=needs.device_bytes + 2 * gates)

    def plan(self, config: OffloadConfig) -> Plan | DevicePlan:
        """Where the memory would go. Raises BudgetError, and ConfigError where a GPU is asked for and there is none."""
        return _plan(self.footprint(), config)


def load(model: str | Path | None = None, **options: Any) -> tuple[Any, Any]:
    """A transformers model whose experts stream from disk, and its tokenizer.

    ``model`` is a store, a Hugging Face checkpoint folder or a hub id (converted on first use into ``$FATE_HOME``); None is the
    embedded model. ``options`` are the fields of OffloadConfig. The model has ``generate()`` and all else that transformers gives
    it, and ``model.fate`` (see Fate). Raises FateError and its children, each with a sentence on what to do.
    """
    config = OffloadConfig.from_options(options)
    if config.on_gpu:
        find_gpu()  # or nothing is converted
    prepared = prepare(store_for(model, config.precision, config.dense_precision))
    return realize(prepared, prepared.plan(config), config), load_tokenizer(prepared.store.path)


def plan(model: str | Path | None = None, **options: Any) -> Plan | DevicePlan:
    """What ``load`` with the same arguments would do with the budget; converts and loads nothing. Raises BudgetError and others."""
    config = OffloadConfig.from_options(options)
    folder = Path(model) if model is not None and is_store(model) else resolve_checkpoint(model or demo.MODEL)
    with config_folder(folder) as described:
        meta_model = build_meta_model(described)
    manifest = open_store(folder).manifest if is_store(folder) else None
    precision = manifest.precision if manifest else config.precision
    return _plan(footprint(meta_model, expert_stacks(meta_model), precision, manifest, config.dense_precision), config)


def _plan(needs: Footprint, config: OffloadConfig) -> Plan | DevicePlan:
    if config.on_gpu:
        return make_device_plan(needs, config, find_gpu(), device_options(config.preset))
    return make_plan(needs, config)


def is_store(path: str | Path) -> bool:
    """Whether ``path`` is an expert store (whole or not) rather than a checkpoint."""
    return (Path(path) / "fate.json").exists()


def store_for(model: str | Path | None, precision: str, dense_precision: str | None = None) -> Path:
    """The store of ``model``, converted into the cache folder on first use (and said so).

    A store given directly is taken as it is, whatever the precisions say.
    """
    if model is not None and is_store(model):
        return Path(model)
    checkpoint = resolve_checkpoint(model if model is not None else demo.MODEL)
    name = (
        "embedded"
        if model is None
        else Path(str(model)).resolve().name
        if Path(str(model)).exists()
        else str(model).replace("/", "--")
    )
    dense = dense_precision or default_dense_precision(precision)
    identity = identity_of(open_checkpoint(checkpoint), precision, dense=dense)
    destination = cache_home() / "stores" / f"{name}-{precision}-{identity[:8]}"
    if not is_store(destination):
        _log.warning("converting %s to %s (once; experts as %s)", name, destination, precision)
        convert(checkpoint, destination, precision, dense_precision=dense)
    return destination


def prepare(path: Path) -> Prepared:
    """Open the store and build its model's meta_model. Raises StoreError where they do not belong together."""
    store = open_store(path)
    model = build_meta_model(path)
    stacks = expert_stacks(model)
    if [(stack.name, stack.num_experts) for stack in stacks] != [
        (layer.name, len(layer.experts)) for layer in store.manifest.layers
    ]:
        raise StoreError(f"{path}: fate.json lists other expert layers than config.json describes; convert the checkpoint again")
    manifest = store.manifest
    for stack in stacks:
        shapes, found = stack.output_rows_first(), set(manifest.layouts_of(stack.layer))
        if any(of != blob_layout(of.precision, shapes, manifest.dtype, of.group_size, of.plane_widths) for of in found):
            raise StoreError(f"{path}: fate.json lays {stack.name} out in another way than this model needs; {_AGAIN}")
    return Prepared(store, model, stacks)


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


def remember(policy: EvictionPolicy, store: Path) -> None:
    """PrecisionRules for later runs what ``policy`` learned."""
    if isinstance(policy, Decayed):
        save_statistics(store, policy.state())


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointError if its files are missing or unreadable."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever hostile tokenizer files make transformers raise
        reason = _first_line(error)
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({reason}); add the checkpoint's tokenizer files") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
