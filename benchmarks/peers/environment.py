"""A virtual environment for each peer, made once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["virtual_environment"]


def virtual_environment(folder: Path, packages: Sequence[str], constraints: Path | None = None) -> Path:
    """The interpreter of ``folder``, which has ``packages``. Raises RuntimeError, in pip's words, if they cannot be had here."""
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists() or done.read_text() != "\n".join(packages):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pinned = ["-c", str(constraints)] if constraints else []
        result = subprocess.run([*pip, *pinned, *packages], stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            said = [line for line in result.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"pip could not install {' '.join(packages)}: {said[-1] if said else result.returncode}")
        done.write_text("\n".join(packages))
    return python
