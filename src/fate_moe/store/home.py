"""The stores under $FATE_HOME: what is there, when each was last used, how one is removed. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fate_moe.errors import StoreError
from fate_moe.io.bounded import load_json
from fate_moe.io.files import lock
from fate_moe.switches import cache_home

__all__ = [
    "StoredModel",
    "check_removable",
    "find_store",
    "identity_of",
    "remove_store",
    "source_name",
    "store_used",
    "stored_models",
    "stores_home",
]

_MANIFEST, _JOURNAL, _LAST_USED, _UNFINISHED = "fate.json", "journal.json", "last-used", ".partial"


@dataclass(frozen=True)
class StoredModel:
    """A store as ``fate list`` shows it.

    ``state`` is "whole", "unfinished" (a conversion that was stopped) or "damaged" (a manifest that cannot be read); ``source`` and
    ``precision`` are known of whole ones. ``num_bytes`` is what its files take; ``last_used`` is a Unix time in seconds, None if it
    was never loaded.
    """

    name: str
    path: str
    state: str
    source: str | None
    precision: str | None
    num_bytes: int
    last_used: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def stores_home() -> Path:
    """The folder of the stores that are converted on first use."""
    return cache_home() / "stores"


def stored_models() -> list[StoredModel]:
    """All stores and unfinished conversions under $FATE_HOME, by name."""
    home = stores_home()
    folders = sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []
    return [_describe(path) for path in folders if _is_ours(path)]


def find_store(name: str) -> Path | None:
    """The folder that is called ``name`` under $FATE_HOME (a store or an unfinished conversion); None if there is none."""
    if not name or name != os.path.basename(name) or name.startswith("."):
        return None
    path = stores_home() / name
    return path if os.path.isdir(path) and _is_ours(path) else None  # os.path: a name may be too long


def source_name(model: str | Path | None) -> str:
    """What a model is called: the last part of its path, a hub id as it is, "embedded" for None."""
    if model is None:
        return "embedded"
    return Path(model).resolve().name if os.path.exists(model) else str(model)


def identity_of(path: Path) -> str | None:
    """The identity in the manifest of the store at ``path``; None where there is no store or it is damaged."""
    try:
        identity = load_json(path / _MANIFEST)["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return identity if isinstance(identity, str) and identity else None


def store_used(path: Path) -> None:
    """Note that the store at ``path`` is being loaded now; a store that cannot be written to keeps no note."""
    with suppress(OSError):  # never through a link, which a store from elsewhere may hold
        os.close(os.open(path / _LAST_USED, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
        os.utime(path / _LAST_USED, follow_symlinks=False)


def remove_store(path: Path) -> int:
    """Delete the store or unfinished conversion at ``path``; returns the bytes that its files took.

    Raises StoreError, and deletes nothing, if ``path`` is anything else, holds folders (no store does) or is being written. The
    manifest goes last: what a kill leaves is still known for a store, and can be removed again.
    """
    check_removable(path)
    with _not_being_written(path):
        num_bytes = _size(path)
        for file in sorted(path.iterdir(), key=lambda file: file.name in (_MANIFEST, _JOURNAL)):
            file.unlink()
        path.rmdir()
    return num_bytes


def check_removable(path: Path) -> None:
    """Raise StoreError for what ``remove_store`` would not touch."""
    if path.is_symlink() or not path.is_dir() or not _is_ours(path):
        raise StoreError(f"{path} is not a store; nothing was removed (fate list shows what is there)")
    if folders := [file.name for file in path.iterdir() if file.is_dir() and not file.is_symlink()]:
        raise StoreError(f"{path} holds folders that are not a store's ({', '.join(folders)}); move them, nothing was removed")


def _is_ours(path: Path) -> bool:
    """Whether the folder is a store, or an unfinished conversion."""
    return (path / _MANIFEST).is_file() or (path.name.endswith(_UNFINISHED) and (path / _JOURNAL).is_file())


def _describe(path: Path) -> StoredModel:
    state, source, precision = "unfinished", None, None
    if not path.name.endswith(_UNFINISHED):
        state = "damaged"
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = load_json(path / _MANIFEST)
            source, precision, state = str(manifest["source"]), str(manifest["precision"]), "whole"
    return StoredModel(path.name, str(path), state, source, precision, _size(path), _last_used(path))


def _size(path: Path) -> int:
    total = 0
    for file in path.iterdir():
        with suppress(FileNotFoundError):  # a conversion renames its files
            total += 0 if file.is_dir() else file.lstat().st_size
    return total


def _last_used(path: Path) -> float | None:
    try:
        return min((path / _LAST_USED).stat().st_mtime, time.time())
    except OSError:
        return None


@contextmanager
def _not_being_written(path: Path) -> Iterator[None]:
    """Hold the lock of a conversion (io.files.locked_folder). Raises StoreError where one has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if not lock(handle):
            raise StoreError(f"{path} is being written by a conversion; stop that first, nothing was removed")
        yield
    finally:
        os.close(handle)
