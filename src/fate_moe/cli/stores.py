"""Verbs about models at rest: plan, convert, inspect."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fate_moe import demo
from fate_moe.cli.options import (
    DEFAULTS,
    add_model,
    add_offload_options,
    offload_config,
    print_json,
    print_table,
    quiet_transformers,
)
from fate_moe.cli.parser import count, file_path, size
from fate_moe.cli.reading import read_text
from fate_moe.config import OffloadConfig
from fate_moe.core import PRECISIONS
from fate_moe.errors import ConfigError
from fate_moe.quant.choices import GROUP_SIZES, SOLVER_NAMES
from fate_moe.units import format_bytes, parse_size

if TYPE_CHECKING:
    from fate_moe.store.mixed_precision import PrecisionRules

__all__ = ["add_verbs"]


MIN_TOKENS = 16  # to calibrate with: an eighth of them is a text whose first token predicts the next


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    plan = verbs.add_parser("plan", help="show what fits where", description="Show where the budget would go; loads nothing.")
    add_model(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(verb=_plan)
    add_offload_options(plan, gpu=True, prefixes=True)

    convert = verbs.add_parser(
        "convert", help="make a store", description="Turn a checkpoint into an expert store; resumes if killed."
    )
    convert.add_argument("source", help="checkpoint folder, GGUF file or hub id")
    convert.add_argument("destination", type=file_path, help="the store's folder, made anew")
    convert.add_argument("--precision", choices=PRECISIONS, default=DEFAULTS["precision"], help="default: %(default)s")
    convert.add_argument(
        "--dense-precision", choices=PRECISIONS, help="of all other matrices; default: int8 beside quantized experts"
    )
    convert.add_argument(
        "--solver", choices=SOLVER_NAMES, default=SOLVER_NAMES[0], help="how codes are chosen; default: %(default)s"
    )
    convert.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, default=64, help="weights that share a scale; default: %(default)s"
    )
    convert.add_argument("--precision-rules", metavar="RULES", help="other precisions: layers.0-1:lossless,layers.3.experts.7:int8")
    convert.add_argument(
        "--auto-bits",
        type=size(parse_size),
        metavar="SIZE",
        help="choose a precision for each layer, all experts within this size; needs --calibrate",
    )
    convert.add_argument(
        "--calibrate",
        type=file_path,
        metavar="FILE",
        help="a text whose activations choose the codes (and, with --auto-bits, the precisions)",
    )
    convert.add_argument(
        "--calibrate-tokens",
        type=count(MIN_TOKENS),
        default=16384,
        metavar="N",
        help="of its tokens, and N/7 that say what shorter views lose; default: %(default)s",
    )
    convert.set_defaults(verb=_convert)

    inspect = verbs.add_parser(
        "inspect",
        help="describe a store or a checkpoint",
        description="Describe a store (--verify reads every byte), or a checkpoint before its conversion (config.json is enough).",
    )
    inspect.add_argument("store", type=file_path, help="store, checkpoint folder or GGUF file")
    inspect.add_argument("--verify", action="store_true", help="check every checksum")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(verb=_inspect)


def _plan(arguments: argparse.Namespace) -> None:
    quiet_transformers()
    from fate_moe.engine.prepare import plan

    config = offload_config(arguments, OffloadConfig.context_length)
    if arguments.model == demo.CHAT and not os.path.exists(demo.CHAT):  # a plan converts nothing
        raise ConfigError(f"{demo.CHAT} is not built yet, so it has no plan; fate run {demo.CHAT} builds it")
    result = plan(arguments.model, **{field.name: getattr(config, field.name) for field in fields(config)})
    if arguments.json:
        print_json(result.as_dict())
    else:
        rows = [(what, format_bytes(size), remark) for what, size, remark in result.rows()]
        print_table(f"{result.family}, {result.precision}", [*rows, *_unread_rows(result.unread)])


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.auto_bits and not arguments.calibrate:
        raise ConfigError("--auto-bits needs a text that shows which layers matter; give one with --calibrate FILE")
    text = None if arguments.calibrate is None else read_text(arguments.calibrate, "the text")
    quiet_transformers()
    from fate_moe.store.convert import convert
    from fate_moe.store.open import open_store

    calibration, rules, held_out = _calibration(arguments, text)
    path = convert(
        arguments.source,
        arguments.destination,
        arguments.precision,
        solver=arguments.solver,
        group_size=arguments.group_size,
        dense_precision=arguments.dense_precision,
        precision_rules=rules,
        calibration=calibration,
    )
    manifest = open_store(path).manifest
    if held_out is not None:
        _measure_views(path, held_out)
    for what, amount, reason in _unread_rows(manifest.unread):
        print(f"{what}: {amount}, {reason}")
    print(
        f"{path}: {manifest.num_experts} experts, {format_bytes(manifest.expert_bytes)}, dense {format_bytes(manifest.dense_bytes)}"
    )


def _unread_rows(unread: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """For a table: how many tensors are not read, the first of them and why."""
    names: dict[str, list[str]] = {}
    for name, reason in unread.items():
        names.setdefault(reason, []).append(name)
    return [
        ("not read", f"{len(found)} tensor{'s' * (len(found) > 1)}", f"{found[0]}{' ...' * (len(found) > 1)}: {reason}")
        for reason, found in names.items()
    ]


def _measure_views(path: Path, tokens: Any) -> None:
    """How much shorter views lose on a text that the codes were not chosen on; written beside the store."""
    from fate_moe.io.progress import count_bar
    from fate_moe.store.learned import save_view_losses
    from fate_moe.tools.calibrate import measure_view_losses

    with count_bar("shorter views", 3 * len(tokens)) as advance:
        losses = measure_view_losses(path, tokens, advance=advance)
    if losses:
        save_view_losses(path, losses)
        print(", ".join(f"{bits}-bit view: {loss:+.3f} nats" for bits, loss in losses.items()), "with every expert read so")


def _calibration(arguments: argparse.Namespace, text: str | None) -> tuple[Any, PrecisionRules, Any]:
    """What the calibration ``text`` says (None without one), what gets another precision than the rest, and the text's last eighth,
    on which nothing was chosen."""
    if text is None and not arguments.precision_rules:
        return None, {}, None
    from fate_moe.adapter.meta_model import build_meta_model, expert_stacks
    from fate_moe.checkpoints.gguf import config_folder
    from fate_moe.checkpoints.source import resolve_checkpoint
    from fate_moe.store.mixed_precision import choose_precisions, parse_precision_rules

    with config_folder(resolve_checkpoint(arguments.source)) as folder:
        stacks = expert_stacks(build_meta_model(folder))
    rules = arguments.precision_rules
    by_rule = parse_precision_rules(rules, [stack.num_experts for stack in stacks]) if rules else {}
    if text is None:
        return None, by_rule, None
    from fate_moe.cli.quality import read_tokens
    from fate_moe.engine.prepare import store_for
    from fate_moe.io.progress import count_bar
    from fate_moe.store.format import blob_layout
    from fate_moe.store.open import open_store
    from fate_moe.tools.calibrate import calibrate, measure_errors

    lossless = store_for(arguments.source, "lossless")
    tokens = read_tokens(text, lossless, arguments.calibrate_tokens * 8 // 7)
    if len(tokens) < MIN_TOKENS:
        raise ConfigError(f"{arguments.calibrate} has only {len(tokens)} tokens; calibration needs at least {MIN_TOKENS}")
    tokens, held_out = tokens[: -(len(tokens) // 8)], tokens[-(len(tokens) // 8) :]
    with count_bar("calibrating", len(tokens)) as advance:
        found = calibrate(lossless, tokens, advance=advance)
    if not arguments.auto_bits:
        return found, by_rule, held_out
    fewer = tuple(name for name in PRECISIONS if name != "lossless")
    with count_bar("layers weighed", len(stacks)) as advance:
        measured = measure_errors(lossless, found, fewer, arguments.group_size, advance)
    dtype = open_store(lossless).manifest.dtype
    sizes = [
        {
            name: stack.num_experts * blob_layout(name, stack.output_rows_first(), dtype, arguments.group_size).length
            for name in PRECISIONS
        }
        for stack in stacks
    ]
    errors = [{**layer, "lossless": 0.0} for layer in measured]
    chosen = choose_precisions(sizes, errors, parse_size(arguments.auto_bits))
    return found, {**dict(enumerate(chosen)), **by_rule}, held_out


def _inspect(arguments: argparse.Namespace) -> None:
    from fate_moe.checkpoints.gguf import find_gguf

    path: Path = arguments.store
    is_checkpoint = any(path.iterdir()) if path.is_dir() else find_gguf(path) is not None
    if is_checkpoint and not (path / "fate.json").exists():
        _inspect_checkpoint(arguments)
        return
    from fate_moe.store.open import open_store, verify

    store = open_store(arguments.store)
    manifest = store.manifest
    layout = manifest.layouts[0]
    facts: dict[str, Any] = {
        "family": manifest.family,
        "precision": manifest.precision,
        "dense_precision": manifest.dense_precision,
        "precision_by_layer": {name: ", ".join(layers) for name, layers in manifest.layers_by_precision().items()},
        "format_version": manifest.format_version,
        "source": manifest.source,
        "layers": manifest.num_layers,
        "experts": manifest.num_experts,
        "expert_bytes": manifest.expert_bytes,
        "slot_bytes": manifest.slot_bytes,
        "dense_bytes": manifest.dense_bytes,
        "sections": {section.name: section.length for section in layout.sections},
        "unread": manifest.unread,
    }
    if arguments.verify:
        verify(store)
        facts["verified"] = True
    if arguments.json:
        print_json(facts)
        return
    rows = [
        (name.replace("_", " "), format_bytes(value) if name.endswith("_bytes") else str(value), "")
        for name, value in facts.items()
        if name not in ("sections", "precision_by_layer", "unread")
    ]
    rows += [(f"  {name}", "", f"MoE layers {layers}") for name, layers in facts["precision_by_layer"].items()]
    rows += [(f"  {section.name}", format_bytes(section.length), "of each blob") for section in layout.sections]
    rows += _unread_rows(manifest.unread)
    print_table(str(arguments.store), rows)


def _inspect_checkpoint(arguments: argparse.Namespace) -> None:
    quiet_transformers()
    from fate_moe.tools.inspect import describe

    if arguments.verify:
        raise ConfigError(f"{arguments.store} is a checkpoint, which has no checksums; convert it first, or omit --verify")
    found = describe(arguments.store)
    if arguments.json:
        print_json(found.as_dict())
        return
    rows = [
        ("family", found.family, ""),
        ("MoE layers", str(found.layers), ""),
        ("experts", str(found.experts), f"in each layer, of which a token takes {found.top_k}"),
        ("dense weights", format_bytes(found.dense_bytes), "always resident"),
        ("KV cache", format_bytes(found.kv_bytes_per_token), "for each token of context"),
    ]
    for name, of in found.precisions.items():
        rows += [(f"{name}: expert", format_bytes(of.expert_bytes), ""), ("  store", format_bytes(of.store_bytes), "on disk")]
        if of.tokens_per_second:
            low, high = of.tokens_per_second
            rows.append(("  tokens a second", f"{low:.1f} to {high:.1f}", "bounds: all experts from disk, as many resident as fit"))
    disk = f"{format_bytes(found.bandwidths.disk)}/s" if found.bandwidths.disk else "not measured"
    rows += _unread_rows(found.unread)
    rows += [("memory reads", f"{format_bytes(found.bandwidths.memory)}/s", "measured now"), ("disk reads", disk, "measured now")]
    print_table(str(arguments.store), rows)
