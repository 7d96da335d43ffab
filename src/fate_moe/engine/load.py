"""From a name to a running model, in one function for both devices: plan, weights, residency, prediction, patches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fate_moe.config import OffloadConfig
from fate_moe.core import EvictionPolicy, ExpertSource
from fate_moe.engine.budget import Plan
from fate_moe.engine.cpu import CpuParts
from fate_moe.engine.device_budget import DevicePlan
from fate_moe.engine.engine import Engine, collect_lost_engines
from fate_moe.engine.patches import Patches
from fate_moe.engine.prepare import Prepared, load_generation_config, load_tokenizer, prepare, store_for
from fate_moe.engine.refusals import refuse_what_needs_parameters, say_sizes
from fate_moe.errors import ConfigError
from fate_moe.gpu.device import find_gpu
from fate_moe.kernels.modes import neutral
from fate_moe.kernels.selfcheck import check_numbers
from fate_moe.memory.decayed import Decayed
from fate_moe.registry import make_policy
from fate_moe.store.home import store_used
from fate_moe.store.learned import load_statistics, save_statistics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Loaded", "build", "load"]

_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model and its tokenizer. ``with`` closes the model at the end:

    >>> with load("path-or-id") as (model, tokenizer):
    ...     model.generate(**tokenizer("Once upon a time", return_tensors="pt"))
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.model.fate.close()


@neutral()
def load(model: str | Path | None = None, **options: Any) -> Loaded:
    """A transformers model whose experts stream from disk, and its tokenizer.

    ``model`` is a store, a Hugging Face checkpoint folder, a GGUF file or a hub id (converted on first use into ``$FATE_HOME``);
    None is the embedded model. ``options`` are the fields of OffloadConfig. The model has ``generate()`` and all else that
    transformers gives it; ``model.fate`` is its Engine. Raises FateError and its children, each with a sentence on what to do.
    """
    config = OffloadConfig.from_options(options)
    if config.on_gpu:
        find_gpu()  # before anything is converted
    collect_lost_engines()
    prepared = prepare(store_for(model, config.precision, config.dense_precision))
    plan = prepared.plan(config)
    tokenizer = load_tokenizer(prepared.store.path)  # its files may be missing, and weights take longer
    return Loaded(build(prepared, plan, config), tokenizer)


class Parts(Protocol):
    """One device's way to do the steps of ``build``, which calls them in this order."""

    num_slots: int

    def guard(self) -> AbstractContextManager[None]: ...

    def place_weights(self) -> None: ...

    def make_residency(self, policy: EvictionPolicy, source: ExpertSource | None) -> None: ...

    def make_prediction(self) -> None: ...

    def patch(self) -> None: ...

    def engine(self, keep_learned: Callable[[], None]) -> Engine: ...

    def preload(self) -> None: ...

    def abandon(self) -> None: ...


@neutral()
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
    GPU has less memory than the plan says, ConfigError where numbers are computed wrongly here. Whatever is raised, nothing stays
    started and the model is as it was.
    """
    check_numbers()
    # Plan: each device has its own parts; the order of steps is the same.
    model, path = prepared.model, prepared.store.path
    patches = Patches(model)
    parts = _parts(prepared, plan, config, patches, device)
    engine: Engine | None = None
    sizes = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    try:
        with parts.guard():
            # Weights: everything that stays resident.
            parts.place_weights()
            load_generation_config(model, path)

            # Residency: who has a slot, ordered by a policy that goes on from what earlier runs learned.
            policy = make_policy(config.policy_name, parts.num_slots, [stack.num_experts for stack in prepared.stacks])
            recalled = _recall(policy, path)
            parts.make_residency(policy, source)

            # Prediction: what is read ahead.
            parts.make_prediction()

            # Patches: the model's experts, layers and limits become ours; calls take turns.
            parts.patch()
            engine = parts.engine(lambda: _keep_learned(policy, path))
            refuse_what_needs_parameters(model, prepared.stacks, path, patches)
            say_sizes(model, sizes, plan.dense_bytes + plan.expert_cache_bytes, patches)
            engine.calls.guard(model, prepared.stacks, patches)
            engine.note_model()
            patches.replace(model, "fate", engine)
            store_used(path)
            if recalled:
                parts.preload()
    except BaseException:
        try:
            (parts.abandon if engine is None else engine.close)()
        finally:
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


def _recall(policy: EvictionPolicy, store: Path) -> bool:
    """Warm start: go on from what earlier runs learned of the routing, if they did."""
    if isinstance(policy, Decayed) and (state := load_statistics(store)) is not None:
        try:
            policy.restore(state)
            return True
        except ConfigError as error:
            _log.warning("%s: %s", store, error)
    return False


def _keep_learned(policy: EvictionPolicy, store: Path) -> None:
    """Keep for later runs what ``policy`` learned."""
    if isinstance(policy, Decayed):
        save_statistics(store, policy.state())
