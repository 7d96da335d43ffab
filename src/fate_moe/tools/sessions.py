"""Conversations that last: $FATE_HOME/sessions/NAME.json, written anew after each turn. No torch.

What the model has read of them is among the prefixes on the disk (schedule/block_files.py); a session knows its files there.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fate_moe.adapter.sampling import RANGES
from fate_moe.errors import ConfigError, FateError, StoreError
from fate_moe.io.bounded import load_json
from fate_moe.io.checked import count, items, require, text
from fate_moe.io.files import atomic_file, lock
from fate_moe.switches import cache_home

__all__ = ["Session", "delete_session", "load_session", "open_session", "save_session", "session_names", "sessions_home"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEPT = re.compile(r"[0-9a-f]{32}/[0-9a-f]{32}\.kv")
_SCHEMA = 1


@dataclass
class Session:
    """A conversation. ``model``: as the command line was given it (None: the embedded one), ``options`` by their names there.

    ``messages`` have "role" and "content". ``kept``: files with what the model read, under $FATE_HOME/kv. Times are Unix times.
    """

    name: str
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    tokens: int = 0  # of the conversation, when it was last read
    began: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "turns": self.turns}


def sessions_home() -> Path:
    """The folder of the sessions."""
    return cache_home() / "sessions"


def session_names() -> list[str]:
    """Of all sessions, by name."""
    home = sessions_home()
    found = [path.stem for path in home.iterdir() if path.suffix == ".json" and path.is_file()] if home.is_dir() else []
    return sorted(name for name in found if _NAME.fullmatch(name))


def load_session(name: str) -> Session | None:
    """The session ``name``; None if there is none. Raises ConfigError for what is no name, StoreError for a damaged file."""
    path = _path(name)
    try:
        return _checked(name, load_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a session ({error}); remove it with fate sessions delete {name}, or mend it") from error


def save_session(session: Session) -> None:
    """Write ``session``, whole or not at all. Raises OSError and DiskSpaceError."""
    session.updated = time.time()
    path = _path(session.name)
    with atomic_file(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(json.dumps({"schema": _SCHEMA, **asdict(session)}).encode())


@contextmanager
def open_session(name: str) -> Iterator[Session]:
    """The session ``name``, which may be new, for this process alone. Raises as ``load_session``, and where another one has it."""
    with _alone(name):
        yield load_session(name) or Session(name)


def delete_session(name: str) -> None:
    """Remove the session, and what is kept of it. Raises ConfigError if there is none, StoreError while it is open."""
    path = _path(name)
    if not path.is_file():
        raise ConfigError(f"there is no session {name}; fate sessions list shows those in {path.parent}")
    with _alone(name):
        with suppress(FateError):  # a damaged one has no list
            session = load_session(name)
            for kept in session.kept if session is not None else ():
                with suppress(OSError):
                    (cache_home() / "kv" / kept).unlink()
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    path = _path(name)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(path.with_suffix(".lock"), flags, 0o600)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}); set FATE_HOME to another folder, or omit --session"
        ) from error
    try:
        if not lock(handle) or os.fstat(handle).st_nlink == 0:  # a session that was deleted meanwhile takes its lock along
            raise StoreError(f"session {name} is open in another process; end that first, or choose another name")
        yield
    finally:
        os.close(handle)


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name of a session; use letters, digits, '.', '_' and '-', up to 64, the first a letter or a digit"
        )
    return sessions_home() / f"{name}.json"


def _checked(name: str, data: Any) -> Session:
    """Raises ValueError, KeyError or TypeError for what is no session."""
    require(data["schema"] == _SCHEMA, f"its version is {data['schema']!r}")
    model, options, times = data["model"], data["options"], (data["began"], data["updated"])
    require(model is None or isinstance(model, str), "its model is no text")
    require(isinstance(options, dict), "its options are none")
    for option, value in options.items():
        require(type(value) in (bool, int, float, str), f"its {option} is {value!r}")
        require(option not in RANGES or RANGES[option].holds(value), f"its {option} is {value!r}")
        require(option not in ("max_new_tokens", "context_length") or count(value) == value, f"its {option} is {value!r}")
    require(all(type(value) in (int, float) and 0 <= value < 1 << 63 for value in times), "its times are no numbers")
    messages = [{"role": text(one["role"]), "content": text(one["content"])} for one in items(data["messages"])]
    kept = [text(one) for one in items(data["kept"])]
    require(all(map(_KEPT.fullmatch, kept)), "it names files that are not its own")
    return Session(name, model, options, messages, kept, count(data["tokens"]), *times)
