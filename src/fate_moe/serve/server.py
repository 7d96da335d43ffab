"""Listening, signals, and an orderly end: uvicorn does the HTTP."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus

from fate_moe.errors import ConfigError, FateError
from fate_moe.schedule.scheduler import StoppedError
from fate_moe.serve.app import build_app
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.service import Service

__all__ = ["Server", "bind", "run"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(options: ServeOptions) -> tuple[socket.socket, str]:
    """A listening socket and its URL, before anything is loaded. Raises ConfigError where the address cannot be had."""
    host, port = options.host, options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with contextlib.ExitStack() as unless_it_listens:
            listener = unless_it_listens.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
            unless_it_listens.pop_all()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"{host}:{port} is in use, perhaps by another fate serve; stop it, or give another --port") from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"port {port} is reserved for the administrator; give a --port from 1024 on") from error
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}; give another --host") from error
    except ValueError as error:  # a name that is no name: zero bytes, labels too long
        raise ConfigError("the --host is not the name or address of this machine; give another") from error
    shown = f"[{host}]" if ":" in host else host
    return listener, f"http://{shown}:{listener.getsockname()[1]}"


class Server(uvicorn.Server):
    """uvicorn that drains when ``should_exit`` is set: no new connections, answers under way go on for ``drain_seconds``.
    ``force_exit`` ends it at once. It leaves signals alone, for it does not run in the main thread."""

    def __init__(self, service: Service) -> None:
        options = service.options
        self._service = service
        # sse-starlette would cut streams off at the first signal.
        AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
        super().__init__(
            uvicorn.Config(
                build_app(service),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="on",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=max(1, round(options.drain_seconds)),
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stopping.set()
        await super().shutdown(sockets)


def run(
    options: ServeOptions, listener: socket.socket, name: str, load: Callable[[], tuple[Any, Any]], on_ready: Callable[[], None]
) -> None:
    """Serve on ``listener`` until a signal comes; ``load`` runs meanwhile, in this thread.

    Raises what ``load`` raises, when all is closed. A signal that comes before ``load`` returns is raised in it, as in any verb, so
    that it removes what is half written; a later one lets the server end its answers.
    """
    loaded: Future[tuple[Any, Any]] = Future()
    ended: Future[None] = Future()
    failed: list[Exception] = []

    def told(error: Exception | None) -> None:
        if error is None:
            on_ready()
        else:
            failed.append(error)
            server.should_exit = True

    def serve() -> None:
        try:
            server.run(sockets=[listener])
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    service = Service.loading(options, name, loaded.result, told)
    server = Server(service)
    threading.Thread(target=serve, name="fate-http", daemon=True).start()
    try:
        try:
            loaded.set_result(load())
        except Exception as error:
            loaded.set_exception(error)
        with _draining(server):
            ended.result()
            _close(service)
    except BaseException:
        server.should_exit = server.force_exit = True
        if not loaded.done():
            loaded.set_exception(StoppedError("the server is shutting down"))
        wait([ended])
        _close(service)
        raise
    if failed:
        if isinstance(failed[0], FateError | OSError):
            raise failed[0]
        raise FateError(f"the model could not be loaded: {type(failed[0]).__name__}: {failed[0]}") from failed[0]


@contextlib.contextmanager
def _draining(server: Server) -> Iterator[None]:
    """Meanwhile a signal lets ``server`` end its answers, and a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _close(service: Service) -> None:
    service.close()
    if service.card is not None:
        service.card.model.fate.close()
