"""From a name to a store that is whole, its model without weights, and a plan; nothing is loaded here."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, GenerationConfig

from fate_moe import demo
from fate_moe.adapter.meta_model import ExpertStack, build_meta_model, expert_stacks
from fate_moe.checkpoints.gguf import config_folder, open_checkpoint
from fate_moe.checkpoints.source import resolve_checkpoint
from fate_moe.config import OffloadConfig
from fate_moe.engine.budget import Footprint, Plan, footprint, make_plan
from fate_moe.engine.device_budget import DevicePlan, make_device_plan
from fate_moe.errors import CheckpointError, StoreError
from fate_moe.gpu.device import find_gpu
from fate_moe.kernels.modes import usual_modes
from fate_moe.registry import PRESETS
from fate_moe.store.convert import convert
from fate_moe.store.dense import default_dense_precision
from fate_moe.store.format import blob_layout
from fate_moe.store.home import stores_home
from fate_moe.store.learned import gates_bytes
from fate_moe.store.open import Store, open_store
from fate_moe.store.plan import store_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prepared", "is_store", "load_generation_config", "load_tokenizer", "plan", "prepare", "store_for"]

_log = logging.getLogger(__name__)

_AGAIN = "delete the store and convert the checkpoint again"


@dataclass(frozen=True)
class Prepared:
    """A whole store and its model on the meta device: enough to plan with, nothing loaded yet."""

    store: Store
    model: Any
    stacks: list[ExpertStack]

    def footprint(self) -> Footprint:
        """What the model needs, the gates of ``fate fit`` among it."""
        needs = footprint(self.model, self.stacks, self.store.manifest.precision, self.store.manifest)
        gates = gates_bytes(self.store.path, self.model.config.get_text_config().hidden_size)
        # On a GPU each lies below another copy of its layer's router.
        return replace(needs, dense_bytes=needs.dense_bytes + gates, device_bytes=needs.device_bytes + 2 * gates)

    def plan(self, config: OffloadConfig) -> Plan | DevicePlan:
        """Where the memory would go. Raises BudgetError, and ConfigError where a GPU is asked for and there is none."""
        return _plan(self.footprint(), config)


@usual_modes()
def plan(model: str | Path | None = None, **options: Any) -> Plan | DevicePlan:
    """What ``load`` with the same arguments would do with the budget; converts and loads nothing.

    Raises BudgetError and what else ``load`` raises.
    """
    config = OffloadConfig.from_options(options)
    if model is not None and is_store(model):
        return prepare(Path(model)).plan(config)
    checkpoint = resolve_checkpoint(model if model is not None else demo.MODEL)
    dense = config.dense_precision or default_dense_precision(config.precision)
    with suppress(CheckpointError):  # config.json alone is enough for a plan
        if is_store(converted := _converted(model, checkpoint, config.precision, dense)):
            return prepare(converted).plan(config)
    with config_folder(checkpoint) as described:
        meta_model = build_meta_model(described)
    return _plan(footprint(meta_model, expert_stacks(meta_model), config.precision, None, config.dense_precision), config)


def _plan(needs: Footprint, config: OffloadConfig) -> Plan | DevicePlan:
    if config.on_gpu:
        return make_device_plan(needs, config, find_gpu(), PRESETS[config.preset].device)
    return make_plan(needs, config)


def is_store(path: str | Path) -> bool:
    """Whether ``path`` is an expert store (whole or not) rather than a checkpoint."""
    return (Path(path) / "fate.json").exists()


def store_for(model: str | Path | None, precision: str, dense_precision: str | None = None) -> Path:
    """The store of ``model``, converted into the cache folder on first use (with a message).

    A store given directly is taken as it is, whatever the precisions say.
    """
    if model is not None and is_store(model):
        return Path(model)
    checkpoint = resolve_checkpoint(model if model is not None else demo.MODEL)
    dense = dense_precision or default_dense_precision(precision)
    destination = _converted(model, checkpoint, precision, dense)
    if not is_store(destination):
        _log.warning("converting %s to %s (once; experts as %s)", _name_of(model), destination, precision)
        convert(checkpoint, destination, precision, dense_precision=dense)
    return destination


def _converted(model: str | Path | None, checkpoint: Path, precision: str, dense: str) -> Path:
    """Where the store of ``checkpoint`` is, or will be, in the cache folder."""
    identity = store_identity(open_checkpoint(checkpoint), precision, dense=dense)
    return stores_home() / f"{_name_of(model)}-{precision}-{identity[:8]}"


def _name_of(model: str | Path | None) -> str:
    if model is None:
        return "embedded"
    return Path(str(model)).resolve().name if Path(str(model)).exists() else str(model).replace("/", "--")


@usual_modes()
def prepare(path: Path) -> Prepared:
    """Open the store at ``path`` and build its model without weights. Raises StoreError where they do not belong together."""
    store = open_store(path)
    model = build_meta_model(path)
    stacks = expert_stacks(model)
    if [(stack.name, stack.num_experts) for stack in stacks] != [
        (layer.name, len(layer.experts)) for layer in store.manifest.layers
    ]:
        raise StoreError(f"{path}: fate.json lists other expert layers than config.json describes; convert the checkpoint again")
    manifest = store.manifest
    for stack in stacks:
        shapes, layouts = stack.output_rows_first(), set(manifest.layouts_of(stack.layer))
        if any(one != blob_layout(one.precision, shapes, manifest.dtype, one.group_size, one.plane_widths) for one in layouts):
            raise StoreError(f"{path}: fate.json lays {stack.name} out in another way than this model needs; {_AGAIN}")
    return Prepared(store, model, stacks)


def load_generation_config(model: Any, store: Path) -> None:
    """The store's generation_config.json, if it has one. Raises StoreError where it cannot be read."""
    if (path := store / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(store)
        except Exception as error:  # whatever a torn or hostile file makes transformers raise
            raise StoreError(f"{path} cannot be read ({_first_line(error)}); copy it from the checkpoint again") from error


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises CheckpointError if its files are missing or unreadable."""
    try:
        return AutoTokenizer.from_pretrained(path)  # type: ignore[no-any-return]
    except Exception as error:  # whatever hostile tokenizer files make transformers raise
        reason = _first_line(error)
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({reason}); add the checkpoint's tokenizer files") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
