"""The command ``fate``: parses, then calls one function a verb. Imports torch only inside the verbs, so that help is instant."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from fate_moe import __version__, demo
from fate_moe.config import POLICIES, PREDICTORS, OffloadConfig, format_bytes
from fate_moe.core import PRECISIONS
from fate_moe.errors import ConfigError, FateError

__all__ = ["main"]

_DEFAULTS = {field.name: field.default for field in fields(OffloadConfig)}
# Options of generate(), by their names in transformers.
_SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "higher is more surprising"),
    "top_k": (int, "sample among the k likeliest tokens"),
    "top_p": (float, "sample among the likeliest tokens that together have this probability"),
    "min_p": (float, "drop tokens below this share of the likeliest one's probability"),
    "repetition_penalty": (float, "above 1.0 discourages repeating"),
    "num_beams": (int, "beam search"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 fine, 1 an error of ours in one line, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        arguments.verb(arguments)
    except FateError as error:
        print(f"fate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `fate run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fate", description="Runs Mixture-of-Experts language models that are bigger than memory."
    )
    parser.add_argument("--version", action="version", version=f"fate {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    run = verbs.add_parser("run", help="write text", description="Continue a prompt; text streams as it is made.")
    run.add_argument("model", nargs="?", help="checkpoint folder, hub id or store; none: the embedded model")
    run.add_argument("prompt", nargs="?", help="the prompt; '-' reads standard input")
    run.add_argument("-f", "--file", type=Path, help="read the prompt from a file")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of text and report")
    run.set_defaults(verb=_run)

    chat = verbs.add_parser("chat", help="talk", description="Talk with the model; /reset forgets, /exit or Ctrl-D ends.")
    chat.add_argument("model", nargs="?", help="checkpoint folder, hub id or store; none: the embedded model")
    chat.set_defaults(verb=_chat)
    for verb in (run, chat):
        _add_sampling_options(verb, 200 if verb is run else 400)

    plan = verbs.add_parser("plan", help="show what fits where", description="Show where the budget would go; loads nothing.")
    plan.add_argument("model", nargs="?", help="checkpoint folder, hub id or store; none: the embedded model")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(verb=_plan)
    for verb in (run, chat, plan):
        _add_offload_options(verb)

    convert = verbs.add_parser(
        "convert", help="make a store", description="Turn a checkpoint into an expert store; resumes if killed."
    )
    convert.add_argument("source", help="checkpoint folder or hub id")
    convert.add_argument("destination", type=Path, help="the store's folder, made anew")
    convert.add_argument("--precision", choices=PRECISIONS, default=_DEFAULTS["precision"], help="default: %(default)s")
    convert.set_defaults(verb=_convert)

    inspect = verbs.add_parser("inspect", help="describe a store", description="Describe a store; --verify reads every byte.")
    inspect.add_argument("store", type=Path)
    inspect.add_argument("--verify", action="store_true", help="check every checksum")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(verb=_inspect)
    return parser


def _add_offload_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and experts")
    group.add_argument(
        "--ram", default=_DEFAULTS["ram"], metavar="SIZE|FRACTION|auto", help="for the whole process; default: %(default)s"
    )
    group.add_argument("--expert-cache", metavar="SIZE|PERCENT", help="for expert slots; default: what the budget leaves")
    group.add_argument("--policy", choices=POLICIES, default=_DEFAULTS["policy"], help="who gives up a slot; default: %(default)s")
    group.add_argument(
        "--predictor", choices=PREDICTORS, default=_DEFAULTS["predictor"], help="who is read ahead; default: %(default)s"
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default=_DEFAULTS["precision"], help="of the experts; default: %(default)s"
    )
    group.add_argument("--context-length", type=int, metavar="N", help="tokens to set KV cache aside for; run: as many as it needs")
    group.add_argument(
        "--io-threads", type=int, default=_DEFAULTS["io_threads"], metavar="N", help="reads at once; default: %(default)s"
    )


def _add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = parser.add_argument_group("sampling (names and meanings as in transformers; default: the model's generation config)")
    group.add_argument("--max-new-tokens", type=_positive, default=max_new_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--do-sample", action=argparse.BooleanOptionalAction, help="sample, or take the likeliest token")
    for name, (kind, text) in _SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    group.add_argument("--seed", type=int, metavar="N", help="make sampling repeatable")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _offload_config(arguments: argparse.Namespace, context_length: int) -> OffloadConfig:
    options = {name: getattr(arguments, name) for name in _DEFAULTS}
    options["context_length"] = context_length if arguments.context_length is None else arguments.context_length
    return OffloadConfig.from_options(options)


def _generate_options(arguments: argparse.Namespace) -> dict[str, Any]:
    import transformers

    if arguments.seed is not None:
        transformers.set_seed(arguments.seed)
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "do_sample", *_SAMPLING)}
    return {name: value for name, value in options.items() if value is not None}


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.file is not None:
        try:
            return str(arguments.file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the prompt file {arguments.file} cannot be read: {error}") from error
    if arguments.prompt == "-" or (arguments.prompt is None and arguments.model is not None and not sys.stdin.isatty()):
        return sys.stdin.read()
    if arguments.prompt is None and arguments.model is None:
        return demo.PROMPT
    if arguments.prompt is None:
        raise ConfigError("no prompt; give it after the model, with --file, or on standard input")
    return str(arguments.prompt)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.prompt is None and " " in (arguments.model or "") and not Path(arguments.model).exists():
        arguments.model, arguments.prompt = None, arguments.model  # `fate run "Once upon a time"`
    prompt = _read_prompt(arguments)
    _quiet_transformers()
    from fate_moe.models.generate import generate
    from fate_moe.models.load import load_tokenizer, prepare, realize, store_for
    from fate_moe.planner import make_plan

    prepared = prepare(store_for(arguments.model, arguments.precision))
    tokenizer = load_tokenizer(prepared.store.path)
    inputs = _encode(tokenizer, prompt, arguments.chat)
    config = _offload_config(arguments, inputs.shape[1] + arguments.max_new_tokens)
    plan = make_plan(prepared.footprint(), config)
    print(plan.line(), file=sys.stderr, flush=True)
    model = realize(prepared, plan, config)
    if arguments.json:
        answer = generate(model, tokenizer, inputs, **_generate_options(arguments))
        name = "embedded" if arguments.model is None else str(arguments.model)
        print(json.dumps({"model": name, **answer.as_dict(), **model.fate.report().as_dict()}))
    else:
        print(prompt, end="", flush=True)
        answer = generate(model, tokenizer, inputs, lambda text: print(text, end="", flush=True), **_generate_options(arguments))
        report = model.fate.report()
        per_token = report.experts.bytes_read / (answer.prompt_tokens + len(answer.tokens))
        print(
            f"\n\n{answer.prompt_tokens} tokens read in {answer.prefill_seconds:.2f} s, {len(answer.tokens)} written at "
            f"{answer.decode_tokens_per_second:.1f} a second, {format_bytes(per_token)} from disk per token\n{report}",
            file=sys.stderr,
        )
    model.fate.close()


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Token ids [1, prompt_tokens]."""
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError("this model has no chat template; leave --chat away")
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if inputs.shape[1] == 0:
        raise ConfigError("the prompt is empty")
    return inputs


def _chat(arguments: argparse.Namespace) -> None:
    _quiet_transformers()
    from fate_moe.models.generate import generate
    from fate_moe.models.load import load_tokenizer, prepare, realize, store_for
    from fate_moe.planner import make_plan

    prepared = prepare(store_for(arguments.model, arguments.precision))
    tokenizer = load_tokenizer(prepared.store.path)
    config = _offload_config(arguments, OffloadConfig.context_length)
    plan = make_plan(prepared.footprint(), config)
    print(plan.line(), file=sys.stderr)
    model = realize(prepared, plan, config)
    if not tokenizer.chat_template:
        print("this model has no chat template: it continues the text of both of you", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while (said := _ask()) is not None:
        if said == "/reset":
            messages.clear()
            continue
        messages.append({"role": "user", "content": said})
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
                "input_ids"
            ]
        else:
            inputs = _encode(tokenizer, "\n".join(message["content"] for message in messages) + "\n", chat=False)
        options = _generate_options(arguments)
        options["max_new_tokens"] = min(options["max_new_tokens"], config.context_length - inputs.shape[1])
        if options["max_new_tokens"] < 1:
            print(f"the conversation fills the context of {config.context_length} tokens; /reset it", file=sys.stderr)
            messages.pop()
            continue
        try:
            answer = generate(model, tokenizer, inputs, lambda text: print(text, end="", flush=True), **options)
        except KeyboardInterrupt:  # stop the answer, not the conversation
            print()
            messages.pop()
            continue
        print()
        messages.append({"role": "assistant", "content": answer.text})
    print(f"\n{model.fate.report()}", file=sys.stderr)
    model.fate.close()


def _ask() -> str | None:
    """The next thing the person says; None when they leave."""
    import readline  # noqa: F401  # line editing for input()

    try:
        while not (said := input("> ").strip()):
            pass
    except EOFError:
        return None
    return None if said == "/exit" else said


def _plan(arguments: argparse.Namespace) -> None:
    _quiet_transformers()
    from fate_moe.models.load import plan

    config = _offload_config(arguments, OffloadConfig.context_length)
    result = plan(arguments.model, **{field.name: getattr(config, field.name) for field in fields(config)})
    if arguments.json:
        print(json.dumps(result.as_dict()))
    else:
        _print_table(
            f"{result.family}, {result.precision}", [(what, format_bytes(size), remark) for what, size, remark in result.rows()]
        )


def _convert(arguments: argparse.Namespace) -> None:
    _quiet_transformers()
    from fate_moe.store.convert import convert
    from fate_moe.store.open import open_store

    path = convert(arguments.source, arguments.destination, arguments.precision)
    manifest = open_store(path).manifest
    print(
        f"{path}: {manifest.num_experts} experts, {format_bytes(manifest.expert_bytes)}, dense {format_bytes(manifest.dense_bytes)}"
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from fate_moe.store.open import open_store, verify

    store = open_store(arguments.store)
    manifest = store.manifest
    layout = manifest.layouts[0]
    facts: dict[str, Any] = {
        "family": manifest.family,
        "precision": manifest.precision,
        "format_version": manifest.format_version,
        "source": manifest.source,
        "layers": manifest.num_layers,
        "experts": manifest.num_experts,
        "expert_bytes": manifest.expert_bytes,
        "slot_bytes": manifest.slot_bytes,
        "dense_bytes": manifest.dense_bytes,
        "sections": {section.name: section.length for section in layout.sections},
    }
    if arguments.verify:
        verify(store)
        facts["verified"] = True
    if arguments.json:
        print(json.dumps(facts))
        return
    rows = [
        (name.replace("_", " "), format_bytes(value) if name.endswith("_bytes") else str(value), "")
        for name, value in facts.items()
        if name != "sections"
    ]
    rows += [(f"  {section.name}", format_bytes(section.length), "of each blob") for section in layout.sections]
    _print_table(str(arguments.store), rows)


def _print_table(title: str, rows: list[tuple[str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    print(title)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
