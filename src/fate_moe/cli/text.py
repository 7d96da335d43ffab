"""The verb that continues a text: run."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from fate_moe import demo
from fate_moe.adapter.config_rules import longest_context, refuse_beyond
from fate_moe.cli.assisted import add_speculation, plan_with_assistant, speculation_of
from fate_moe.cli.net import say, uninterrupted
from fate_moe.cli.options import (
    add_model,
    add_offload_options,
    add_sampling_options,
    generate_options,
    offload_config,
    print_json,
    quiet_transformers,
    require_gpu,
    store_of,
)
from fate_moe.cli.parser import file_path
from fate_moe.cli.reading import Shown, argument_text, is_piped, read_stdin, read_text
from fate_moe.errors import ConfigError
from fate_moe.schedule.speculation import Mode

__all__ = ["add_verbs", "beams_of", "printer"]

_NO_PROMPT = "no prompt; give it after the model, with -p, with --file, or on standard input"
# Characters of a prompt that are tokenized at first, to tell from them how many tokens all are.
_SAMPLE = 1 << 18


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    run = verbs.add_parser(
        "run",
        help="write text",
        description="Continue a prompt; text streams as it is made. A single argument that is no path, hub id or store is a prompt "
        "for the embedded model. Control characters in the text are shown as signs; --json has it as it is.",
    )
    add_model(run)
    run.add_argument("prompt", nargs="?", help="the prompt; '-' reads standard input")
    given = run.add_mutually_exclusive_group()
    given.add_argument("-p", "--prompt", dest="prompt_option", metavar="TEXT", help="the prompt, whatever it looks like")
    given.add_argument("-f", "--file", type=file_path, help="read the prompt from a file (UTF-8); - is standard input")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of text and report")
    run.set_defaults(verb=_run)
    add_sampling_options(run, 200)
    add_speculation(run)
    add_offload_options(run, gpu=True)


def _model_and_prompt(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """The model (None: the embedded one) and the prompt. Raises ConfigError for no prompt, two, or one that is no text."""
    model: str | None = arguments.model
    prompt: str | None = arguments.prompt
    option_given = arguments.prompt_option is not None or arguments.file is not None
    if option_given and prompt is not None:
        raise ConfigError("two prompts; give it after the model, with -p or with --file, but once")
    if prompt is None and not option_given and model is not None and not _names_a_model(model):
        if model.isprintable() and " " not in model and model not in ("", "-"):  # perhaps a misspelt model
            say(f"{model!r} is no path, hub id (org/name) or store: a prompt for the embedded model")
        model, prompt = None, model
    if arguments.file is not None:
        text = read_text(arguments.file, "the prompt file")
    elif prompt == "-":
        text = read_stdin()
    elif prompt is not None or option_given:
        text = argument_text(arguments.prompt_option if prompt is None else prompt)
    elif model is not None and sys.stdin.isatty():
        raise ConfigError(_NO_PROMPT)
    elif model is not None or is_piped():
        text = read_stdin()
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
    return exists or text == demo.CHAT or bool(re.fullmatch(r"(\.{0,2}/|~/).*|[\w.-]+/[\w./-]*|\S+\.gguf", text, flags=re.DOTALL))


def _run(arguments: argparse.Namespace) -> None:
    arguments.model, prompt = _model_and_prompt(arguments)
    quiet_transformers()
    from fate_moe.engine.load import build
    from fate_moe.engine.prepare import load_generation_config, load_tokenizer, prepare
    from fate_moe.tools.generate import generate
    from fate_moe.tools.tokens import as_input, chat_text, num_rows, token_ids

    require_gpu(arguments)
    prepared = prepare(store_of(arguments))
    tokenizer = load_tokenizer(prepared.store.path)
    load_generation_config(prepared.model, prepared.store.path)
    text = chat_text(tokenizer, [{"role": "user", "content": prompt}]) if arguments.chat else prompt
    rows, longest = num_rows(prepared.model), longest_context(prepared.model.config)
    if len(text) > 4 * _SAMPLE:
        _refuse_far_too_long(text, len(token_ids(tokenizer, text[:_SAMPLE], rows)), arguments.context_length or longest)
    inputs = as_input(token_ids(tokenizer, text, rows, special=not arguments.chat))
    if inputs.shape[1] == 0:
        raise ConfigError("the prompt is empty")
    beams = beams_of(arguments, prepared.model)
    refuse_beyond(arguments.context_length, prepared.model.config, beams)
    needed = _needed(inputs.shape[1], arguments.max_new_tokens, beams, arguments.context_length)
    speculate, config = speculation_of(arguments, beams), offload_config(arguments, needed)
    config, plan, assistant = plan_with_assistant(arguments, prepared, config, tokenizer)
    say(plan.line())
    if longest is not None and needed > longest * beams:
        say(f"prompt and answer take {needed // beams} tokens; this model was made for {longest}")
    model = build(prepared, plan, config)
    model.fate.assistant = assistant
    with uninterrupted(model.fate.close):
        options, reading = {**generate_options(arguments), **_drafts(speculate, beams, model)}, ReadingLine()
        if arguments.json:
            answer = generate(model, tokenizer, inputs, on_read=reading, **options)
            reading.end()
            name = "embedded" if arguments.model is None else str(arguments.model)
            print_json({"model": name, **answer.as_dict(), **model.fate.report().as_dict()})
            return
        print(Shown()(prompt), end="", flush=True)
        answer = generate(model, tokenizer, inputs, printer(reading), reading, **options)
        reading.end()
        print(flush=True)
        report = model.fate.report()
        traffic = report.traffic(answer.prompt_tokens + len(answer.tokens))
        say(
            f"\n{answer.prompt_tokens} tokens read in {answer.prefill_seconds:.2f} s, {len(answer.tokens)} written at "
            f"{answer.decode_tokens_per_second:.1f} a second, {traffic}\n{report}"
        )


def printer(reading: ReadingLine | None = None) -> Any:
    """What prints each piece of a text at once, in place of ``reading``."""
    shown = Shown()

    def write(text: str) -> None:
        if reading is not None:
            reading.end()
        print(shown(text), end="", flush=True)

    return write


class ReadingLine:
    """A line on standard error, where that is a terminal, that says how much of a prompt is read, until ``end``."""

    def __init__(self) -> None:
        self._is_there = False

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty() and done:
            self._is_there = True
            print(f"\rreading the prompt: {done} of {total} tokens", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line back."""
        if self._is_there:
            self._is_there = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _drafts(mode: Mode, beams: int, model: Any) -> dict[str, Any]:
    """The option of ``generate()`` that makes it draft. Raises ConfigError where nothing can be drafted."""
    from fate_moe.schedule.drafted import drafted
    from fate_moe.schedule.speculation import Speculation

    if mode == "off":
        return {}
    if beams > 1:
        raise ConfigError("--speculate is for one continuation; omit it, or --num-beams")
    speculation = Speculation(mode, counts=getattr(model.fate, "drafts", None), assistant=model.fate.assistant)
    return {"custom_generate": drafted(speculation)}


def beams_of(arguments: argparse.Namespace, model: Any) -> int:
    """How many continuations are followed at once."""
    return int(arguments.num_beams or model.generation_config.num_beams or 1)


def _needed(prompt_tokens: int, new_tokens: int, beams: int, context_length: int | None) -> int:
    """Tokens of KV cache for prompt and answer, in every beam. Raises ConfigError where ``context_length`` is less."""
    needed = beams * (prompt_tokens + new_tokens)
    if context_length is not None and needed > context_length:
        each = f", in each of {beams} beams" if beams > 1 else ""
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens and the answer up to {new_tokens}{each}: {needed} in all, "
            f"and context_length is {context_length}; give --context-length {needed}, or a smaller --max-new-tokens"
        )
    return needed


def _refuse_far_too_long(text: str, sampled: int, limit: int | None) -> None:
    """Raise ConfigError for a prompt whose first _SAMPLE characters, ``sampled`` tokens, say that all take more than ``limit``."""
    estimate = sampled * len(text) // _SAMPLE
    if limit is not None and estimate > 2 * limit:
        raise ConfigError(
            f"the prompt of {len(text)} characters is about {estimate} tokens, and the context has {limit}; give a shorter prompt, "
            "or a larger --context-length"
        )
