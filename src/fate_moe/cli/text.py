"""Verbs that write text: run, chat."""

from __future__ import annotations

import argparse
import os
import re
import stat
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from fate_moe import demo
from fate_moe.cli.options import (
    DEMO_CHAT,
    MODEL_HELP,
    add_offload_options,
    add_sampling_options,
    generate_options,
    model_name,
    offload_config,
    print_json,
    quiet_transformers,
    require_gpu,
    with_demo_chat,
)
from fate_moe.config import OffloadConfig
from fate_moe.errors import ConfigError

__all__ = ["add_verbs"]

_NO_PROMPT = "no prompt; give it after the model, with -p, with --file, or on standard input"


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    run = verbs.add_parser(
        "run",
        help="write text",
        description="Continue a prompt; text streams as it is made. A single argument that is no path, hub id or store is a prompt "
        "for the embedded model.",
    )
    run.add_argument("model", nargs="?", type=model_name, help=MODEL_HELP)
    run.add_argument("prompt", nargs="?", help="the prompt; '-' reads standard input")
    given = run.add_mutually_exclusive_group()
    given.add_argument("-p", "--prompt", dest="prompt_option", metavar="TEXT", help="the prompt, whatever it looks like")
    given.add_argument("-f", "--file", type=Path, help="read the prompt from a file (UTF-8)")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of text and report")
    run.set_defaults(verb=_run)

    chat = verbs.add_parser("chat", help="talk", description="Talk with the model; /reset forgets, /exit or Ctrl-D ends.")
    chat.add_argument("model", nargs="?", type=model_name, help=MODEL_HELP)
    chat.set_defaults(verb=_chat)
    for verb in (run, chat):
        add_sampling_options(verb, 200 if verb is run else 400)
        add_offload_options(verb, gpu=True)


def _model_and_prompt(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """The model (None: the embedded one) and the prompt. Raises ConfigError for no prompt, two, or one that is no text."""
    model: str | None = arguments.model
    prompt: str | None = arguments.prompt
    option_given = arguments.prompt_option is not None or arguments.file is not None
    if option_given and prompt is not None:
        raise ConfigError("two prompts; give it after the model, with -p or with --file, but once")
    if prompt is None and not option_given and model is not None and not _names_a_model(model):
        if model.isprintable() and " " not in model and model not in ("", "-"):  # perhaps a misspelt model
            print(f"{model!r} is no path, hub id (org/name) or store: a prompt for the embedded model", file=sys.stderr)
        model, prompt = None, model
    if arguments.file is not None:
        text = _read_file(arguments.file)
    elif prompt == "-":
        text = _read_stdin()
    elif prompt is not None or option_given:
        text = _argument_text(arguments.prompt_option if prompt is None else prompt)
    elif model is not None and sys.stdin.isatty():
        raise ConfigError(_NO_PROMPT)
    elif model is not None or _is_piped():
        text = _read_stdin()
        if not text and model is not None:
            raise ConfigError(_NO_PROMPT)
        text = text or demo.PROMPT
    else:
        text = demo.PROMPT
    if not text:
        raise ConfigError("the prompt is empty")
    return model, text


def _names_a_model(text: str) -> bool:
    """Whether the only argument means a model: it exists, or is written as a path, a GGUF file, a hub id or demo-chat."""
    try:
        exists = bool(text) and Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False
    return exists or text == DEMO_CHAT or bool(re.fullmatch(r"(\.{0,2}/|~/).*|[\w.-]+/[\w./-]*|\S+\.gguf", text, flags=re.DOTALL))


def _argument_text(text: str) -> str:
    """``text`` of the command line. Raises ConfigError where the shell gave bytes that are no UTF-8."""
    try:
        return text.encode("utf-8").decode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is not UTF-8; convert it, or set the terminal to UTF-8") from error


def _read_file(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"the prompt file {path} cannot be read: {error.strerror}") from error


def _read_stdin() -> str:
    binary = getattr(sys.stdin, "buffer", None)
    return _decoded(binary.read(), "standard input") if binary is not None else sys.stdin.read()


def _decoded(data: bytes, what: str) -> str:
    """UTF-8 with or without a byte order mark, lines ended in any way."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 (byte {error.start}); convert it, for example with iconv -t UTF-8") from error


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, which someone meant as a prompt (and not a terminal or /dev/null)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _run(arguments: argparse.Namespace) -> None:
    arguments.model, prompt = _model_and_prompt(arguments)
    quiet_transformers()
    from fate_moe.engine.load import build
    from fate_moe.engine.prepare import load_tokenizer, prepare, store_for
    from fate_moe.tools.generate import generate

    require_gpu(arguments)
    prepared = prepare(store_for(with_demo_chat(arguments.model), arguments.precision, arguments.dense_precision))
    tokenizer = load_tokenizer(prepared.store.path)
    inputs = _encode(tokenizer, prompt, arguments.chat)
    config = offload_config(arguments, inputs.shape[1] + arguments.max_new_tokens)
    plan = prepared.plan(config)
    print(plan.line(), file=sys.stderr, flush=True)
    _say_if_too_long(prepared.model, inputs.shape[1] + arguments.max_new_tokens)
    model = build(prepared, plan, config)
    with closing(model.fate):
        if arguments.json:
            answer = generate(model, tokenizer, inputs, **generate_options(arguments))
            name = "embedded" if arguments.model is None else str(arguments.model)
            print_json({"model": name, **answer.as_dict(), **model.fate.report().as_dict()})
            return
        print(prompt, end="", flush=True)
        answer = generate(model, tokenizer, inputs, lambda text: print(text, end="", flush=True), **generate_options(arguments))
        report = model.fate.report()
        traffic = report.traffic(answer.prompt_tokens + len(answer.tokens))
        print(
            f"\n\n{answer.prompt_tokens} tokens read in {answer.prefill_seconds:.2f} s, {len(answer.tokens)} written at "
            f"{answer.decode_tokens_per_second:.1f} a second, {traffic}\n{report}",
            file=sys.stderr,
        )


def _say_if_too_long(model: Any, num_tokens: int) -> None:
    """A line on stderr where prompt and answer are longer than the model was made for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and num_tokens > longest:
        print(f"prompt and answer take {num_tokens} tokens; this model was made for {longest}", file=sys.stderr)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Token ids [1, prompt_tokens]."""
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError("this model has no chat template; omit --chat")
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

    require_gpu(arguments)
    prepared = prepare(store_for(with_demo_chat(arguments.model), arguments.precision, arguments.dense_precision))
    tokenizer = load_tokenizer(prepared.store.path)
    config = offload_config(arguments, OffloadConfig.context_length)
    plan = prepared.plan(config)
    print(plan.line(), file=sys.stderr)
    model = build(prepared, plan, config)
    with closing(model.fate):
        if not tokenizer.chat_template:
            print("this model has no chat template: it continues the text of both of you", file=sys.stderr)
        _talk(model, tokenizer, config.context_length, generate_options(arguments))
        print(f"\n{model.fate.report()}", file=sys.stderr)


def _talk(model: Any, tokenizer: Any, context_length: int, sampling: dict[str, Any]) -> None:
    """Ask and answer until the person leaves."""
    from fate_moe.tools.generate import generate

    if reconfigure := getattr(sys.stdin, "reconfigure", None):  # before the first read
        reconfigure(errors="replace")
    messages: list[dict[str, str]] = []
    while (line := _ask()) is not None:
        if line == "/reset":
            messages.clear()
            continue
        messages.append({"role": "user", "content": line})
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
                "input_ids"
            ]
        else:
            inputs = _encode(tokenizer, "\n".join(message["content"] for message in messages) + "\n", chat=False)
        options = {**sampling, "max_new_tokens": min(sampling["max_new_tokens"], context_length - inputs.shape[1])}
        if options["max_new_tokens"] < 1:
            print(f"the conversation fills the context of {context_length} tokens; /reset it", file=sys.stderr)
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


def _ask() -> str | None:
    """The next line that the person writes; None when they leave. Ctrl-C drops a line, twice in a row leaves."""
    import readline  # noqa: F401  # line editing for input()

    interrupted = False
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends)", file=sys.stderr)
            if interrupted:
                return None
            interrupted = True
            continue
        if line:
            return None if line == "/exit" else line
        interrupted = False
