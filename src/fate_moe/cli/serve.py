"""The verb that serves: HTTP APIs and a page for one model."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from fate_moe import switches
from fate_moe.adapter.config_rules import longest_context
from fate_moe.cli.assisted import add_speculation, plan_with_assistant, speculation_of
from fate_moe.cli.net import say
from fate_moe.cli.options import (
    add_model,
    add_offload_options,
    offload_config,
    quiet_transformers,
    require_gpu,
    store_of,
)
from fate_moe.cli.parser import count, file_path, number, size
from fate_moe.cli.reading import read_text
from fate_moe.errors import ConfigError
from fate_moe.serve.options import ServeOptions, is_loopback
from fate_moe.store.home import source_name
from fate_moe.units import parse_size

__all__ = ["add_verbs"]

_EXTRA = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")
# Tokens of context where nobody says: enough for a conversation; an agent wants more, which costs expert slots.
_CONTEXT_LENGTH = 8192


def add_verbs(verbs: Any) -> None:
    """Add this group's verbs to the parser's ``verbs``."""
    serve = verbs.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model to clients of OpenAI's and Anthropic's APIs, and a page that shows the experts at work. Needs "
        "pip install 'fate-moe[serve]'.",
    )
    add_model(serve)
    group = serve.add_argument_group("server")
    group.add_argument("--host", default=ServeOptions.host, help="address to listen on; default: %(default)s, this machine alone")
    group.add_argument("--port", type=count(0, 65535), default=ServeOptions.port, help="0: any that is free; default: %(default)s")
    group.add_argument("--name", help="what clients call the model; default: its own name")
    key = group.add_mutually_exclusive_group()
    key.add_argument("--api-key", metavar="KEY", help="what clients must send; users of this machine see it in the process list")
    key.add_argument(
        "--api-key-file",
        type=file_path,
        metavar="FILE",
        help="a file with the key, which hides it from them; so does the variable FATE_API_KEY",
    )
    group.add_argument("--cors", action="append", metavar="ORIGIN", help="a site whose pages may call; '*': all; may be repeated")
    group.add_argument(
        "--queue",
        type=count(0, 1 << 20),
        default=ServeOptions.queue,
        metavar="N",
        help="requests that may wait; default: %(default)s",
    )
    group.add_argument(
        "--parallel",
        type=count(1, 256),
        metavar="N",
        help="requests that run at once, in one KV cache; default: up to 8, by --context-length; on a GPU always 1",
    )
    group.add_argument(
        "--max-body", type=size(parse_size), default="16MiB", metavar="SIZE", help="the largest request; default: %(default)s"
    )
    group.add_argument(
        "--drain-seconds",
        type=number(0, 86400),
        default=ServeOptions.drain_seconds,
        metavar="N",
        help="how long answers may take to end after SIGTERM; default: %(default)s",
    )
    add_speculation(group)
    group.add_argument("--open", action="store_true", help="open the page in a browser once the model is loaded")
    group.add_argument("--log-requests", action="store_true", help="a line on stderr for each request, without its contents")
    group.add_argument("--log-prompts", action="store_true", help="prompts and answers on stderr too")
    serve.set_defaults(verb=_serve)
    add_offload_options(serve, gpu=True, prefixes=True)


def _serve(arguments: argparse.Namespace) -> None:
    for package in _EXTRA:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(f"fate serve needs {package}, which cannot be imported; pip install 'fate-moe[serve]'") from error
    from fate_moe.serve.server import bind, run

    options = ServeOptions(
        host=arguments.host,
        port=arguments.port,
        api_key=_api_key(arguments),
        cors=tuple(arguments.cors or ()),
        queue=arguments.queue,
        parallel=arguments.parallel,
        max_body=parse_size(arguments.max_body),
        log_requests=arguments.log_requests or arguments.log_prompts,
        log_prompts=arguments.log_prompts,
        drain_seconds=arguments.drain_seconds,
        speculate=speculation_of(arguments),
    )
    require_gpu(arguments)  # what is misspelt or missing is said before anything is bound
    listener, url = bind(options)
    if not is_loopback(options.host) and options.api_key is None:
        say(f"warning: whoever reaches {options.host} may use this server; give --api-key-file, or --host 127.0.0.1")
    say(f"fate serve: {url} (loading; Ctrl-C ends)")

    def ready() -> None:
        say(f"ready: {url}/v1")
        if arguments.open:
            import webbrowser

            webbrowser.open(url)

    with listener:
        run(options, listener, arguments.name or source_name(arguments.model), lambda: _load(arguments), ready)


def _api_key(arguments: argparse.Namespace) -> str | None:
    """The key that clients must send: from an option, a file or FATE_API_KEY. Raises ConfigError for a file without one."""
    if arguments.api_key_file is not None:
        if not (key := read_text(arguments.api_key_file, "the api key file").strip()):
            raise ConfigError(f"the api key file {arguments.api_key_file} is empty")
        return key
    return arguments.api_key if arguments.api_key is not None else switches.api_key()


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    quiet_transformers()
    from fate_moe.engine.load import build
    from fate_moe.engine.prepare import load_tokenizer, prepare

    prepared = prepare(store_of(arguments))
    config = offload_config(arguments, min(longest_context(prepared.model.config) or _CONTEXT_LENGTH, _CONTEXT_LENGTH))
    tokenizer = load_tokenizer(prepared.store.path)
    config, plan, assistant = plan_with_assistant(arguments, prepared, config, tokenizer)
    say(plan.line())
    model = build(prepared, plan, config)
    model.fate.assistant = assistant
    return model, tokenizer
