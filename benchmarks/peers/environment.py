"""A virtual environment for each peer, made once."""

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
    """The interpreter of ``folder``, which has ``packages``; ``build`` are environment variables for those that compile.

    Raises RuntimeError, in pip's words, if they cannot be had here.
    """
    python = folder / "bin" / "python"
    done = folder / ".installed"
    wanted = "\n".join([*packages, *(f"{name}={value}" for name, value in (build or {}).items())])
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pinned = ["-c", str(constraints)] if constraints else []
        environment = os.environ | (build or {})
        result = subprocess.run([*pip, *pinned, *packages], stderr=subprocess.PIPE, text=True, check=False, env=environment)
        if result.returncode:
            said = [line for line in result.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"pip could not install {' '.join(packages)}: {said[-1] if said else result.returncode}")
        done.write_text(wanted)
    return python
