"""Verbs that write text: run, chat."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fate_moe import demo
from fate_moe.cli.options import (
    MODEL_HELP,
    add_offload_options,
    add_sampling_options,
    generate_options,
    offload_config,
    quiet_transformers,
    require_gpu,
)
from fate_moe.config import OffloadConfig
from fate_moe.errors import ConfigError

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    run = verbs.add_parser("run", help="write text", description="Continue a prompt; text streams as it is made.")
    run.add_argument("model", nargs="?", help=MODEL_HELP)
    run.add_argument("prompt", nargs="?", help="the prompt; '-' reads standard input")
    run.add_argument("-f", "--file", type=Path, help="read the prompt from a file")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of text and report")
    run.set_defaults(verb=_run)

    chat = verbs.add_parser("chat", help="talk", description="Talk with the model; /reset forgets, /exit or Ctrl-D ends.")
    chat.add_argument("model", nargs="?", help=MODEL_HELP)
    chat.set_defaults(verb=_chat)
    for verb in (run, chat):
        add_sampling_options(verb, 200 if verb is run else 400)
        add_offload_options(verb, gpu=True)


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
    quiet_transformers()
    from fate_moe.engine.load import build
    from fate_moe.engine.prepare import load_tokenizer, prepare, store_for
    from fate_moe.tools.generate import generate

    require_gpu(arguments)
    prepared = prepare(store_for(arguments.model, arguments.precision, arguments.dense_precision))
    tokenizer = load_tokenizer(prepared.store.path)
    inputs = _encode(tokenizer, prompt, arguments.chat)
    config = offload_config(arguments, inputs.shape[1] + arguments.max_new_tokens)
    plan = prepared.plan(config)
    print(plan.line(), file=sys.stderr, flush=True)
    model = build(prepared, plan, config)
    if arguments.json:
        answer = generate(model, tokenizer, inputs, **generate_options(arguments))
        name = "embedded" if arguments.model is None else str(arguments.model)
        print(json.dumps({"model": name, **answer.as_dict(), **model.fate.report().as_dict()}))
    else:
        print(prompt, end="", flush=True)
        answer = generate(model, tokenizer, inputs, lambda text: print(text, end="", flush=True), **generate_options(arguments))
        report = model.fate.report()
        traffic = report.traffic(answer.prompt_tokens + len(answer.tokens))
        print(
            f"\n\n{answer.prompt_tokens} tokens read in {answer.prefill_seconds:.2f} s, {len(answer.tokens)} written at "
            f"{answer.decode_tokens_per_second:.1f} a second, {traffic}\n{report}",
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
    quiet_transformers()
    from fate_moe.engine.load import build
    from fate_moe.engine.prepare import load_tokenizer, prepare, store_for
    from fate_moe.tools.generate import generate

    require_gpu(arguments)
    prepared = prepare(store_for(arguments.model, arguments.precision, arguments.dense_precision))
    tokenizer = load_tokenizer(prepared.store.path)
    config = offload_config(arguments, OffloadConfig.context_length)
    plan = prepared.plan(config)
    print(plan.line(), file=sys.stderr)
    model = build(prepared, plan, config)
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
        options = generate_options(arguments)
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
