"""Verbs of conversations: chat, sessions."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fate_moe.adapter.config_rules import longest_context, refuse_beyond
from fate_moe.cli.assisted import add_speculation, plan_with_assistant, speculation_of
from fate_moe.cli.listing import ago
from fate_moe.cli.net import one_line, say, uninterrupted
from fate_moe.cli.options import (
    add_model,
    add_offload_options,
    add_sampling_options,
    draw_table,
    generate_options,
    offload_config,
    print_json,
    quiet_transformers,
    require_gpu,
    store_of,
)
from fate_moe.cli.reading import Shown
from fate_moe.cli.text import ReadingLine, beams_of, printer
from fate_moe.config import OffloadConfig
from fate_moe.errors import ConfigError, FateError
from fate_moe.tools.sessions import (
    Session,
    delete_session,
    load_session,
    open_session,
    save_session,
    session_names,
    sessions_home,
)

if TYPE_CHECKING:
    from fate_moe.tools.answering import Answering

__all__ = ["add_verbs"]

_log = logging.getLogger(__name__)

_COMMANDS = "/reset forgets the conversation, /drop its oldest turns where the context is full, /exit or Ctrl-D ends it"
# What a session goes on with, unless the command line says something else.
_SETTINGS = (
    *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams", "seed"),
    *("precision", "dense_precision", "context_length"),
)


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    chat = verbs.add_parser("chat", help="talk", description="Talk with the model; /help lists the commands, /exit or Ctrl-D ends.")
    add_model(chat)
    chat.add_argument(
        "--session",
        metavar="NAME",
        help="keep the conversation under this name, with its model and settings, or go on with it; fate sessions shows them",
    )
    add_sampling_options(chat, 400)
    add_speculation(chat)
    add_offload_options(chat, gpu=True, prefixes=True)
    chat.set_defaults(verb=_chat, usual={name: chat.get_default(name) for name in _SETTINGS})

    sessions = verbs.add_parser(
        "sessions", help="show and delete conversations", description="Show, export and delete what `fate chat --session` keeps."
    )
    kinds = sessions.add_subparsers(required=True, metavar="WHAT")
    for name, verb, text in (
        ("list", _list, "show all sessions"),
        ("show", _show, "show a conversation"),
        ("export", _export, "print a conversation as Markdown, or as JSON"),
        ("delete", _delete, "delete sessions and what is kept of them on the disk"),
    ):
        kind = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == "delete":
            kind.add_argument("names", nargs="+", metavar="NAME", help="as fate sessions list shows it")
        else:
            kind.add_argument("--json", action="store_true", help="print one JSON object")
        if name in ("show", "export"):
            kind.add_argument("name", metavar="NAME", help="as fate sessions list shows it")
        kind.set_defaults(verb=verb)


def _chat(arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        session = stack.enter_context(open_session(arguments.session)) if arguments.session is not None else None
        if session is not None:
            _go_on(session, arguments)
        _converse(arguments, session)


def _go_on(session: Session, arguments: argparse.Namespace) -> None:
    """The session's model and settings, where ``arguments`` has none of its own; what is given is the session's from now on."""
    if arguments.model is None:
        arguments.model = session.model
    elif session.messages and session.model != _absolute(arguments.model):
        before = session.model or "the embedded model"
        say(one_line(f"session {session.name} was with {before} and goes on with {arguments.model}"))
    for name, usual in arguments.usual.items():
        if getattr(arguments, name) == usual and name in session.options:
            setattr(arguments, name, session.options[name])
    session.model = _absolute(arguments.model)
    session.options = {name: value for name in _SETTINGS if (value := getattr(arguments, name)) is not None}


def _absolute(model: str | None) -> str | None:
    """A path that is the same in other folders; other names as they are."""
    return str(Path(model).resolve()) if model is not None and Path(model).exists() else model


def _converse(arguments: argparse.Namespace, session: Session | None) -> None:
    quiet_transformers()
    from fate_moe.engine.load import build
    from fate_moe.engine.prepare import load_generation_config, load_tokenizer, prepare
    from fate_moe.tools.answering import Answering

    require_gpu(arguments)
    prepared = prepare(store_of(arguments))
    tokenizer = load_tokenizer(prepared.store.path)
    load_generation_config(prepared.model, prepared.store.path)
    beams, longest = beams_of(arguments, prepared.model), longest_context(prepared.model.config)
    refuse_beyond(arguments.context_length, prepared.model.config, beams)
    usual = OffloadConfig.context_length
    speculate = speculation_of(arguments, beams)
    config = offload_config(arguments, usual if longest is None else min(usual, longest * beams))
    config, plan, assistant = plan_with_assistant(arguments, prepared, config, tokenizer)
    say(plan.line())
    model = build(prepared, plan, config)
    model.fate.assistant = assistant
    with uninterrupted(model.fate.close):
        if not tokenizer.chat_template:
            say("this model has no chat template: it continues the conversation as plain text")
        context_length = config.context_length // beams
        answering = Answering(model, tokenizer, generate_options(arguments), arguments.seed, speculate)
        with uninterrupted(answering.close):
            _talk(Talk(model, tokenizer, answering, context_length, arguments.max_new_tokens, session))
        say(f"\n{model.fate.report()}")


@dataclass
class Talk:
    """What a turn needs; ``session`` keeps the conversation, if one does."""

    model: Any
    tokenizer: Any
    answering: Answering
    context_length: int
    max_new_tokens: int
    session: Session | None = None


class _FullError(FateError):
    """The conversation fills the context; without its ``oldest`` turns it does not (0: the last message alone is too long)."""

    def __init__(self, message: str, oldest: int) -> None:
        super().__init__(message)
        self.oldest = oldest


def _talk(talk: Talk) -> None:
    """Ask and answer until the person leaves; a turn that fails is said and forgotten."""
    if reconfigure := getattr(sys.stdin, "reconfigure", None):  # before the first read
        reconfigure(errors="replace")
    session = talk.session
    messages: list[dict[str, str]] = session.messages if session is not None else []
    if session is not None and messages:
        say(f"session {session.name} goes on after {session.turns} turns, {session.tokens} tokens; /reset forgets them")
    full: tuple[str, int] | None = None  # a message that had no room, and the turns before it that would have to go
    while (line := _ask()) is not None:
        if line == "/drop" and full is not None:
            line, oldest = full
            del messages[: 2 * oldest]
            say("the oldest turn is forgotten" if oldest == 1 else f"the oldest {oldest} turns are forgotten")
        elif re.fullmatch(r"/\w+", line):
            if line == "/reset":
                messages.clear()
                full = None
                _keep(session)
            elif line == "/drop":
                say("nothing has to be dropped")
            else:
                say(_COMMANDS if line == "/help" else f"there is no command {line}; {_COMMANDS}")
            continue
        full = None
        messages.append({"role": "user", "content": line})
        try:
            answer = _turn(talk, messages)
        except KeyboardInterrupt:  # stop the answer, not the conversation
            print()
            messages.pop()
            _keep(session)
        except _FullError as error:
            say(f"fate: {error}")
            left_out = messages.pop()["content"]
            full = (left_out, error.oldest) if error.oldest else None
        except OSError:  # nobody reads the answers
            raise
        except Exception as error:
            failed = str(error) if isinstance(error, FateError) else f"{type(error).__name__}: {error}"
            say(f"fate: this turn failed and is forgotten: {one_line(failed)}")
            messages.pop()
            _keep(session)
        else:
            messages.append({"role": "assistant", "content": answer})
            _keep(session)


def _keep(session: Session | None) -> None:
    """Write the session; what cannot be written is said, and the conversation goes on."""
    if session is not None:
        try:
            save_session(session)
        except (OSError, FateError) as error:
            say(f"fate: session {session.name} could not be written, its last turn is kept nowhere else: {one_line(str(error))}")


def _turn(talk: Talk, messages: Sequence[dict[str, str]]) -> str:
    """The model's answer, printed as it is made. Raises _FullError where the conversation fills the context."""
    from fate_moe.tools.tokens import num_rows

    rows, room = num_rows(talk.model), talk.context_length
    ids = _tokens(talk.tokenizer, messages, rows)
    if len(ids) >= room:
        said = f"the conversation has {len(ids)} tokens and the context {room}"
        spare = min(talk.max_new_tokens, room // 4)  # for the answer
        for oldest in range(1, len(messages) // 2 + 1):
            if len(_tokens(talk.tokenizer, messages[2 * oldest :], rows)) + spare <= room:
                turns = "the oldest turn" if oldest == 1 else f"the oldest {oldest} turns"
                raise _FullError(f"{said}; /drop forgets {turns} and answers, /reset forgets all", oldest)
        raise _FullError(f"{said}; the message alone is too long, say less", 0)
    reading, text = ReadingLine(), ids
    try:
        answer = talk.answering.answer(ids, min(talk.max_new_tokens, room - len(ids)), printer(reading), reading)
        text = [*ids, *answer.tokens]
    finally:
        reading.end()
        if talk.session is not None:  # an interrupted turn, too, leaves what it read
            talk.session.tokens = len(text)
            talk.session.kept = list(dict.fromkeys([*talk.session.kept, *talk.answering.kept_files(text)]))
    print(flush=True)
    _log.info("%d of %d tokens were there", answer.cached_tokens, answer.prompt_tokens)
    return answer.text


def _tokens(tokenizer: Any, messages: Sequence[dict[str, str]], rows: int) -> list[int]:
    """The conversation, ready for the next message."""
    from fate_moe.tools.tokens import chat_text, token_ids

    templated = bool(tokenizer.chat_template)
    text = chat_text(tokenizer, messages) if templated else "\n".join(message["content"] for message in messages) + "\n"
    return token_ids(tokenizer, text, rows, special=not templated)


def _ask() -> str | None:
    """The next line that the person writes; None when they leave. Ctrl-C drops a line, twice in a row leaves."""
    with suppress(ImportError):  # line editing for input()
        import readline  # noqa: F401

    interrupted = False
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            say("\n(/exit or Ctrl-D ends)")
            if interrupted:
                return None
            interrupted = True
            continue
        if line:
            return None if line in ("/exit", "/quit", "/bye") else line
        interrupted = False


def _list(arguments: argparse.Namespace) -> None:
    sessions, damaged = list[Session](), list[str]()
    for name in session_names():
        try:
            if (session := load_session(name)) is not None:
                sessions.append(session)
        except FateError as error:
            damaged.append(str(error))
    for line in damaged:
        say(one_line(line))
    if arguments.json:
        facts = [{name: value for name, value in one.as_dict().items() if name not in ("messages", "kept")} for one in sessions]
        print_json({"home": str(sessions_home()), "sessions": facts})
        return
    if not sessions:
        print(f"no sessions in {sessions_home()}; fate chat --session NAME begins one")
        return
    from rich.table import Table

    table = Table()
    for title in ("name", "model", "turns", "tokens", "last used"):
        table.add_column(title, justify="right" if title in ("turns", "tokens") else "left", overflow="fold")
    for one in sessions:
        table.add_row(one.name, one_line(one.model or "embedded"), str(one.turns), str(one.tokens), ago(one.updated))
    draw_table(table)


def _show(arguments: argparse.Namespace) -> None:
    _print(arguments, lambda message: f"{'> ' if message['role'] == 'user' else ''}{message['content']}")


def _export(arguments: argparse.Namespace) -> None:
    _print(arguments, lambda message: f"**{message['role']}**\n\n{message['content']}\n")


def _print(arguments: argparse.Namespace, written: Callable[[dict[str, str]], str]) -> None:
    if (session := load_session(arguments.name)) is None:
        raise ConfigError(f"there is no session {arguments.name}; fate sessions list shows those in {sessions_home()}")
    if arguments.json:
        print_json({name: value for name, value in session.as_dict().items() if name != "kept"})
        return
    for message in session.messages:
        print(Shown()(written(message)))


def _delete(arguments: argparse.Namespace) -> None:
    for name in arguments.names:
        delete_session(name)
        print(f"deleted {name}")
