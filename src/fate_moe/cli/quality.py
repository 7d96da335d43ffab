"""Verbs about how good a model is: eval perplexity, eval compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fate_moe.cli.net import say, uninterrupted
from fate_moe.cli.options import (
    MODEL_HELP,
    add_model,
    add_offload_options,
    model_name,
    offload_config,
    print_json,
    print_table,
    quiet_transformers,
    store_of,
    with_demo_chat,
)
from fate_moe.cli.parser import count, file_path
from fate_moe.cli.reading import read_text
from fate_moe.config import OffloadConfig
from fate_moe.errors import ConfigError
from fate_moe.units import format_bytes

__all__ = ["add_verbs", "read_tokens"]


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    group = verbs.add_parser("eval", help="measure quality", description="Measure how well a model predicts text.")
    kinds = group.add_subparsers(required=True, metavar="WHAT")
    one = kinds.add_parser("perplexity", help="of a text", description="Perplexity of a text, in windows.")
    add_model(one)
    one.add_argument("--stride", type=count(), metavar="N", help="tokens from one window to the next; default: window - 1")
    one.set_defaults(verb=_perplexity)
    two = kinds.add_parser(
        "compare",
        help="two models on a text",
        description="How far B's predictions are from A's. A is the reference: a store, or a checkpoint taken lossless; "
        "the options are B's.",
    )
    two.add_argument("a", type=model_name, help=MODEL_HELP)
    two.add_argument("b", nargs="?", type=model_name, help="default: the same as A")
    two.set_defaults(verb=_compare)
    harness = kinds.add_parser(
        "harness",
        help="EleutherAI's lm_eval",
        description="Run lm_eval's own command line with the model 'fate': -- --tasks hellaswag --model_args model=FOLDER",
        add_help=False,
    )
    harness.add_argument("arguments", nargs=argparse.REMAINDER, help="lm_eval's own, after --")
    harness.set_defaults(verb=_harness)
    for kind in (one, two):
        kind.add_argument("--text", type=file_path, required=True, metavar="FILE", help="the text, UTF-8; - is standard input")
        kind.add_argument("--max-tokens", type=count(2), metavar="N", help="take no more than the text's first N tokens")
        kind.add_argument("--window", type=count(2), default=512, metavar="N", help="tokens read at once; default: %(default)s")
        kind.add_argument(
            "--decode", action="store_true", help="feed tokens one at a time, as in writing; default: windows at once"
        )
        kind.add_argument("--json", action="store_true", help="print one JSON object")
        add_offload_options(kind)


def _check_window(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for windows that skip tokens, or that the context which was asked for does not hold."""
    window, stride, context = arguments.window, getattr(arguments, "stride", None), arguments.context_length
    if stride is not None and stride >= window:
        raise ConfigError(f"--stride {stride} with windows of {window} tokens skips tokens; give one from 1 to {window - 1}")
    if context is not None and context < window:
        raise ConfigError(f"--window {window} is longer than --context-length {context}; give a smaller window, or omit the length")


def _perplexity(arguments: argparse.Namespace) -> None:
    _check_window(arguments)
    text = read_text(arguments.text, "the text")
    quiet_transformers()
    from fate_moe.io.progress import count_bar
    from fate_moe.tools.evaluate import perplexity

    path = store_of(arguments)
    tokens = read_tokens(text, path, arguments.max_tokens)
    model = _open(path, offload_config(arguments, arguments.window), arguments.window)
    with uninterrupted(model.fate.close), count_bar("tokens", len(tokens)) as advance:
        found = perplexity(
            model, tokens, window=arguments.window, stride=arguments.stride, decode=arguments.decode, advance=advance
        )
        report = model.fate.report()
    per_token = report.experts.bytes_read / found.tokens
    if arguments.json:
        name = "embedded" if arguments.model is None else arguments.model
        print_json({"model": name, **found.as_dict(), "bytes_read_per_token": per_token, **report.as_dict()})
        return
    rows = [
        ("perplexity", f"{found.perplexity:.4g}", f"{found.loss:.4f} nats per token"),
        ("tokens", str(found.tokens), f"windows of {found.window}, every {found.stride}"),
        ("tokens per second", f"{found.tokens / found.seconds:.1f}", "one at a time" if arguments.decode else "windows at once"),
        ("read from disk per token", format_bytes(per_token), ""),
    ]
    print_table(str(arguments.text), rows)
    say(str(report))


def _compare(arguments: argparse.Namespace) -> None:
    _check_window(arguments)
    text = read_text(arguments.text, "the text")
    quiet_transformers()
    from fate_moe.engine.prepare import store_for
    from fate_moe.io.progress import count_bar
    from fate_moe.tools.evaluate import compare

    reference = store_for(with_demo_chat(arguments.a), "lossless")
    path = store_for(with_demo_chat(arguments.b or arguments.a), arguments.precision, arguments.dense_precision)
    tokens = read_tokens(text, reference, arguments.max_tokens)
    config = offload_config(arguments, arguments.window)
    plain = OffloadConfig(ram=config.ram, context_length=config.context_length)
    with count_bar("tokens", 2 * len(tokens)) as advance:
        found = compare(
            lambda: _open(reference, plain, arguments.window),
            lambda: _open(path, config, arguments.window),
            tokens,
            window=arguments.window,
            decode=arguments.decode,
            advance=advance,
        )
    if arguments.json:
        print_json({"a": arguments.a, "b": str(path), **found.as_dict()})
        return
    change = found.perplexity_b / found.perplexity_a - 1
    rows = [
        ("KL divergence", f"{found.kl_divergence:.5f}", "nats per token, of B's predictions from A's"),
        ("same likeliest token", f"{found.top1_agreement:.2%}", f"of {found.tokens} tokens"),
        ("perplexity of A", f"{found.perplexity_a:.4g}", str(reference)),
        ("perplexity of B", f"{found.perplexity_b:.4g}", f"{change:+.2%}, {path}"),
    ]
    print_table(str(arguments.text), rows)


def _harness(arguments: argparse.Namespace) -> None:
    quiet_transformers()
    from fate_moe.tools.harness import run_harness

    run_harness([argument for argument in arguments.arguments if argument != "--"])


def _open(path: Path, config: OffloadConfig, window: int) -> Any:
    """The model of the store, with room for a window's logits set aside besides its KV cache."""
    from dataclasses import replace

    from fate_moe.engine.budget import make_plan
    from fate_moe.engine.load import build
    from fate_moe.engine.prepare import prepare
    from fate_moe.tools.evaluate import logits_bytes

    prepared = prepare(path)
    needs = prepared.footprint()
    extra = logits_bytes(prepared.model.config.get_text_config().vocab_size, window)
    whole = needs.rows_at_once(config) == config.context_length and not needs.in_pieces
    per_token = needs.kv_bytes(config) + (needs.activation_bytes_per_token if whole else 0)
    roomy = replace(config, context_length=config.context_length + -(-extra // per_token))
    plan = make_plan(needs, roomy)
    say(plan.line())
    return build(prepared, plan, roomy)


def read_tokens(text: str, store: Path, max_tokens: int | None = None) -> Any:
    """The first ``max_tokens`` token ids [num_tokens] of ``text`` for the model of ``store``.

    Raises ConfigError if there are fewer than 2, and CheckpointError for one that the model does not have.
    """
    import torch

    from fate_moe.engine.prepare import load_tokenizer, prepare
    from fate_moe.tools.tokens import first_tokens, num_rows

    ids = first_tokens(load_tokenizer(store), text, num_rows(prepare(store).model), max_tokens)
    if len(ids) < 2:
        raise ConfigError("the text has fewer than two tokens, so there is nothing to predict; give a longer text")
    return torch.tensor(ids, dtype=torch.int64)
