"""Every environment variable that this package reads."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_home"]


def cache_home() -> Path:
    """Where converted stores live: ``$FATE_HOME``, else ``~/.cache/fate``."""
    return Path(os.environ.get("FATE_HOME") or Path.home() / ".cache" / "fate")
