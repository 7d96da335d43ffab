"""The identity of a store: a digest that copies of a checkpoint share, and that differs where other bytes would be stored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fate_moe.adapter.config_rules import read_config
from fate_moe.checkpoints.files import find_index
from fate_moe.checkpoints.source import Checkpoint
from fate_moe.errors import CheckpointError
from fate_moe.io.digests import KnownDigests
from fate_moe.io.progress import progress_bar
from fate_moe.quant.solver import DEFAULT_SOLVER
from fate_moe.store.format import FORMAT_VERSION
from fate_moe.store.mixed_precision import PrecisionRules
from fate_moe.switches import cache_home

__all__ = ["StoreOptions", "known_identity", "older_identity", "store_identity", "stored_config"]

# Entries of config.json that say how a model is run, not what is stored: editing one changes the store's config.json alone. Another
# value of any other entry makes another store.
_HOW_IT_RUNS = re.compile(
    r"_.*|architectures|auto_map|transformers_version|.*_token_ids?|.*rope.*|(original_)?max_position_embeddings|model_max_length|"
    r"max_length|sliding_window|use_sliding_window|max_window_layers|num_experts_per_tok(en)?|experts_per_token|topk_group|norm_topk_prob|"
    r"routed_scaling_factor|scoring_func|router_.*|output_router_logits|.*aux.*|.*_eps(ilon)?|.*dropout.*|.*_pdrop|initializer_.*|"
    r"use_cache|output_(attentions|hidden_states)|return_dict.*|hidden_act(ivation)?|.*softcapping|swiglu_limit|pretraining_tp|"
    r"attn_implementation|temperature|top_[kp]|do_sample|id2label|label2id|problem_type|task_specific_params|torchscript|chat_template"
)
_QUICK_BYTES = 64 << 20
_SHOWN_BYTES = 1 << 30  # from here on a progress bar shows that files are read


class StoreOptions(NamedTuple):
    """The options of a conversion that decide what is stored. ``calibration`` is the digest of the text, "" without one."""

    precision: str
    dense: str = "lossless"
    solver: str = DEFAULT_SOLVER
    group_size: int = 64
    precision_rules: PrecisionRules | None = None
    calibration: str = ""


def store_identity(checkpoint: Checkpoint, options: StoreOptions, progress: bool | None = None) -> str:
    """A digest of the weight files' bytes, of config.json as far as it decides what is stored, ``options`` and the format version.

    Reads the files whose digest is not known (see KnownDigests; the list is in $FATE_HOME), with a bar on stderr where that takes
    long (``progress`` None: if stderr is a terminal). Raises CheckpointError when a file cannot be read.
    """
    digests = _digests()
    try:
        unknown = [file for file in checkpoint.files if digests.get(file) is None]
        made: dict[Path, str] = {}
        if unknown:
            total = sum(file.stat().st_size for file in unknown)
            with progress_bar("reading the checkpoint", total, progress if total >= _SHOWN_BYTES else False) as advance:
                made = {file: digests.make(file, advance) for file in unknown}
            digests.save()
        return _identity(checkpoint, options, [made.get(file) or digests.get(file) for file in checkpoint.files])
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); fetch the checkpoint again") from error


def known_identity(checkpoint: Checkpoint, options: StoreOptions) -> str | None:
    """``store_identity`` where it is known without reading more than 64 MiB of weights, else None."""
    digests = _digests()
    try:
        unknown = sum(file.stat().st_size for file in checkpoint.files if digests.get(file) is None)
    except OSError:
        return None
    return store_identity(checkpoint, options) if unknown <= _QUICK_BYTES else None


def older_identity(checkpoint: Checkpoint, options: StoreOptions) -> str:
    """The identity that versions up to 0.2 gave: of the files' names, sizes and times. Their stores are still found by it."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    config = hashlib.sha256((checkpoint.folder / "config.json").read_bytes()).hexdigest()
    return _digest(_told(options, config, files))


def stored_config(config: Any) -> Any:
    """``config`` (JSON) without what does not decide what is stored, at any depth."""
    if isinstance(config, dict):
        return {key: stored_config(value) for key, value in config.items() if not _HOW_IT_RUNS.fullmatch(key)}
    return [stored_config(value) for value in config] if isinstance(config, list) else config


def _digests() -> KnownDigests:
    return KnownDigests(cache_home() / "digests.json")


def _identity(checkpoint: Checkpoint, options: StoreOptions, digests: list[str | None]) -> str:
    config = json.dumps(stored_config(read_config(checkpoint.folder)), sort_keys=True)
    return _digest(["content", *_told(options, config, [*digests, *_index(checkpoint.folder)])])


def _index(folder: Path) -> list[str]:
    """The index, which decides whose tensor counts where two files have one of a name."""
    path = find_index(folder)
    return [hashlib.sha256(path.read_bytes()).hexdigest()] if path is not None else []


def _told(options: StoreOptions, config: str, files: Iterable[object]) -> list[object]:
    precision, dense, solver, group_size, rules, calibration = options
    facts: list[object] = [FORMAT_VERSION, precision, [solver, group_size] if precision != "lossless" else "", config, list(files)]
    if dense != "lossless":
        facts.append(dense)
    if rules or calibration:
        facts += [sorted((rules or {}).items(), key=lambda rule: (type(rule[0]) is not int, rule)), calibration]
    return facts


def _digest(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
