"""From a name to a store that is whole, its model without weights, and a plan; nothing is loaded here."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from fate_moe import demo
from fate_moe.adapter.meta_model import ExpertStack, build_meta_model, expert_stacks
from fate_moe.adapter.sampling import read_generation_config
from fate_moe.checkpoints.gguf import find_gguf, open_checkpoint
from fate_moe.checkpoints.source import Checkpoint, has_tokenizer, resolve_checkpoint
from fate_moe.config import OffloadConfig
from fate_moe.engine.budget import Footprint, Plan, footprint, make_plan
from fate_moe.engine.device_budget import DevicePlan, make_device_plan
from fate_moe.engine.tokenizer import load_tokenizer
from fate_moe.errors import CheckpointError, StoreError, first_line
from fate_moe.gpu.device import find_gpu
from fate_moe.kernels.modes import neutral
from fate_moe.kernels.selfcheck import check_numbers
from fate_moe.registry import PRESETS
from fate_moe.store.companions import refresh_companions
from fate_moe.store.convert import write_store
from fate_moe.store.dense import default_dense_precision
from fate_moe.store.format import AGAIN, blob_layout
from fate_moe.store.home import identity_of, source_name, stores_home
from fate_moe.store.identity import StoreOptions, known_identity, older_identity, store_identity
from fate_moe.store.learned import gates_bytes
from fate_moe.store.open import Store, open_store
from fate_moe.store.plan import describe_model, plan_conversion

__all__ = ["Prepared", "is_store", "load_generation_config", "load_tokenizer", "plan", "prepare", "store_for"]

_log = logging.getLogger(__name__)

_MOST_NAME_BYTES = 100


@dataclass(frozen=True)
class Prepared:
    """A whole store and its model on the meta device: enough to plan with, nothing loaded yet."""

    store: Store
    model: Any
    stacks: list[ExpertStack]

    def footprint(self) -> Footprint:
        """What the model needs, the gates of ``fate fit`` among it."""
        needs = footprint(self.model, self.stacks, self.store.manifest.precision, self.store)
        gates = gates_bytes(self.store.path, self.model.config.get_text_config().hidden_size)
        # On a GPU each lies below another copy of its layer's router.
        return replace(needs, dense_bytes=needs.dense_bytes + gates, device_bytes=needs.device_bytes + 2 * gates)

    def plan(self, config: OffloadConfig) -> Plan | DevicePlan:
        """Where the memory would go. Raises BudgetError, and ConfigError where a GPU is asked for and there is none."""
        return replace(_plan(self.footprint(), config), unread=self.store.manifest.unread)


@neutral()
def plan(model: str | Path | None = None, **options: Any) -> Plan | DevicePlan:
    """What ``load`` with the same arguments would do with the budget; converts and loads nothing.

    A store that was converted from the checkpoint says it exactly. It is looked for only where that needs no long
    reading of weights; else config.json is enough. Raises BudgetError and what else ``load`` raises.
    """
    config = OffloadConfig.from_options(options)
    if model is not None and is_store(model):
        return prepare(Path(model)).plan(config)
    path = resolve_checkpoint(model if model is not None else demo.MODEL)
    told = StoreOptions(config.precision, config.dense_precision or default_dense_precision(config.precision))
    with suppress(CheckpointError):  # config.json alone is enough for a plan
        checkpoint = open_checkpoint(path)
        if (found := _find_store(checkpoint, _name_of(model), told, known_identity(checkpoint, told))) and is_store(found):
            return prepare(found).plan(config)
    meta_model, unread = describe_model(path)
    needs = footprint(meta_model, expert_stacks(meta_model), config.precision, None, config.dense_precision)
    return replace(_plan(needs, config), unread=unread)


def _plan(needs: Footprint, config: OffloadConfig) -> Plan | DevicePlan:
    if config.on_gpu:
        return make_device_plan(needs, config, find_gpu(), PRESETS[config.preset].device)
    return make_plan(needs, config)


def is_store(path: str | Path) -> bool:
    """Whether ``path`` is an expert store (whole or not) rather than a checkpoint."""
    return os.path.exists(Path(path) / "fate.json")


@neutral()
def store_for(model: str | Path | None, precision: str, dense_precision: str | None = None) -> Path:
    """The store of ``model``, converted into the cache folder on first use (with a message).

    Copies of a checkpoint, and the same files under another name, have one store. Its tokenizer, template and configuration follow
    the checkpoint's (see ``refresh_companions``). A store given directly is taken as it is, whatever the precisions say.
    """
    if model is not None and is_store(model):
        return Path(model)
    path = resolve_checkpoint(model if model is not None else demo.MODEL)
    options = StoreOptions(precision, dense_precision or default_dense_precision(precision))
    checkpoint, name, conversion = open_checkpoint(path), _name_of(model), None
    if not (found := _find_store(checkpoint, name, options, None)):  # one of an earlier version needs no weights to be read
        if (identity := known_identity(checkpoint, options)) is None:
            # Planned before gigabytes are read: a checkpoint that is refused is refused at once.
            conversion = plan_conversion(checkpoint, precision, dense_precision=options.dense)
            identity = store_identity(checkpoint, options)
        found = _find_store(checkpoint, name, options, identity) or stores_home() / f"{name}-{precision}-{identity[:8]}"
    if not is_store(found):
        check_numbers()
        conversion = conversion or plan_conversion(checkpoint, precision, dense_precision=options.dense)
        _log.warning("converting %s to %s (once; experts as %s)", name, found, precision)
        write_store(conversion, found, options, path if model is None else model)
    elif find_gguf(path) is None or not has_tokenizer(found):  # a GGUF file holds its tokenizer, and the identity covers it
        refresh_companions(checkpoint, found)
    return found


def _find_store(checkpoint: Checkpoint, name: str, options: StoreOptions, identity: str | None) -> Path | None:
    """The store in the cache folder that was made from ``checkpoint``, or where a conversion of it was begun; None: neither.

    ``identity`` None: only a store of an earlier version is looked for, which is found by the files' times.
    """
    home, kind = stores_home(), options.precision
    for known in filter(None, (identity, older_identity(checkpoint, options))):
        usual = home / f"{name}-{kind}-{known[:8]}"
        places = [usual, *sorted(home.glob(f"*-{kind}-{known[:8]}"))]
        if found := next((path for path in places if identity_of(path) == known), None):
            return found
        if is_store(usual):
            return usual  # damaged: whoever opens it says so
    begun = sorted(home.glob(f"*-{kind}-{identity[:8]}.partial")) if identity else []
    return begun[0].with_suffix("") if begun else None


def _name_of(model: str | Path | None) -> str:
    """A name for a folder, short enough with all that is added to it: the checkpoint's folder or hub id in plain characters."""
    plain = re.sub(r"^\.|/", "--", source_name(model))
    plain = "".join(letter if letter.isprintable() else "_" for letter in plain)
    return plain.encode()[:_MOST_NAME_BYTES].decode(errors="ignore")


@neutral()
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
            raise StoreError(f"{path}: fate.json lays {stack.name} out in another way than this model needs; {AGAIN}")
    return Prepared(store, model, stacks)


def load_generation_config(model: Any, store: Path) -> None:
    """The store's generation_config.json, if it has one. Raises StoreError, naming file and field, where it has no meaning."""
    if (path := store / "generation_config.json").exists():
        options = read_generation_config(path, model.get_input_embeddings().weight.shape[0])
        try:
            model.generation_config = GenerationConfig.from_dict(options)
            model.generation_config.validate()
        except Exception as error:  # whatever a torn or hostile file makes transformers raise
            raise StoreError(f"{path} cannot be read ({first_line(error)}); copy it from the checkpoint again") from error
