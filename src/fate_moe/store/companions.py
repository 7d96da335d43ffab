"""Keeps the files beside a store's weights (configuration, tokenizer, chat template) equal to the checkpoint's."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from fate_moe.checkpoints.source import Checkpoint
from fate_moe.errors import FateError, StoreError
from fate_moe.io.bounded import read_bounded
from fate_moe.io.files import atomic_file

__all__ = ["refresh_companions"]

_log = logging.getLogger(__name__)


def refresh_companions(checkpoint: Checkpoint, store: Path) -> None:
    """Copy each of the checkpoint's companion files into ``store`` where the store's copy differs or is missing.

    The store must have this checkpoint's identity: its config.json then differs only in how the model is run. A file that the
    checkpoint does not have stays. Raises CheckpointError when a file cannot be read, StoreError when it cannot be copied.
    """
    for path in checkpoint.companions():
        data = checkpoint.read_companion(path)
        copy = store / path.name
        try:
            if _is_same(copy, data):
                continue
            with atomic_file(copy, shared=True) as file:
                file.write(data)
        except (OSError, FateError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise StoreError(
                f"{copy} differs from the checkpoint's and cannot be replaced ({reason}); make {store} writable, or give that "
                "folder as the model to run it as it is"
            ) from error
        _log.warning("%s is now the checkpoint's", copy)


def _is_same(copy: Path, data: bytes) -> bool:
    try:
        present = read_bounded(copy)
    except FileNotFoundError:
        return False
    if present == data or copy.suffix != ".json":
        return present == data
    try:
        return bool(json.loads(present) == json.loads(data))
    except (ValueError, RecursionError):
        return False
