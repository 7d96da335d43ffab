"""How the server is run."""

from __future__ import annotations

from dataclasses import dataclass, field

from fate_moe.errors import ConfigError
from fate_moe.schedule.speculation import DEFAULT, Mode
from fate_moe.schedule.speculation import MODES as SPECULATE

__all__ = ["ServeOptions", "is_loopback"]


@dataclass(frozen=True)
class ServeOptions:
    """``api_key``: what a client must send (None: nothing). ``cors``: origins whose pages may call, "*" for all. ``queue``:
    requests that may wait. ``parallel``: requests that run at once (None: chosen by the model and its KV cache). ``max_body``:
    bytes of a request. ``log_requests``: a line for each request on stderr; ``log_prompts``: with prompt and answer.
    ``drain_seconds``: how long answers may take to end after SIGTERM. ``keep_alive_seconds``: between two comments on a stream that
    say what it waits for and keep the connection open. ``speculate``: which drafted tokens are checked (schedule/speculation.py).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)  # a secret is in no log
    cors: tuple[str, ...] = ()
    queue: int = 64
    parallel: int | None = None
    max_body: int = 16 << 20
    log_requests: bool = False
    log_prompts: bool = False
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 5.0
    speculate: Mode = DEFAULT

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"the port must be between 0 and 65535, not {self.port}")
        for name, least in (("queue", 1), ("max_body", 1), ("drain_seconds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.speculate not in SPECULATE:
            raise ConfigError(f"speculate is {', '.join(SPECULATE[:-1])} or {SPECULATE[-1]}, not {self.speculate!r}")
        if self.parallel is not None and self.parallel < 1:
            raise ConfigError(f"parallel must be at least 1, not {self.parallel}")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the api key is empty; give one, or none")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the api key has characters that no header can hold; use letters, digits and signs of ASCII")

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Names by which a browser may call this server; empty: any. Without a key, a page of another site could otherwise reach a
        loopback server through a name that it lets point there (DNS rebinding)."""
        return ("localhost", "127.0.0.1", "[::1]") if self.api_key is None and is_loopback(self.host) else ()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    return host in ("localhost", "::1") or host.startswith("127.")
