"""Creates a virtual environment for each peer, once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["virtual_environment"]


def virtual_environment(
    folder: Path, packages: Sequence[str], constraints: Path | None = None, build: dict[str, str] | None = None
) -> Path:
    """The interpreter of a virtual environment in ``folder`` with ``packages``; ``build`` are environment variables for compiling.

    Raises RuntimeError with pip's message if they cannot be installed.
    """
    python = folder / "bin" / "python"
    done = folder / ".installed"
    requested = "\n".join([*packages, *(f"{name}={value}" for name, value in (build or {}).items())])
    if not done.exists() or done.read_text() != requested:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pinned = ["-c", str(constraints)] if constraints else []
        environment = os.environ | (build or {})
        result = subprocess.run([*pip, *pinned, *packages], stderr=subprocess.PIPE, text=True, check=False, env=environment)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"pip could not install {' '.join(packages)}: {lines[-1] if lines else result.returncode}")
        done.write_text(requested)
    return python
