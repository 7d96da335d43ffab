"""This engine with its presets, and transformers with accelerate's disk offload: one worker, two virtual environments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.peers import Variant
from benchmarks.peers.environment import virtual_environment

__all__ = ["Accelerate", "Fate"]

_WORKER = Path(__file__).with_name("transformers_worker.py")
_PROJECT = Path(__file__).parents[2]
# A control group also counts the page cache of the libraries. Found by measuring: half of this made a batch of 4 thrash on it.
_HEADROOM_BYTES = 256 << 20


class Fate:
    """This checkout with one of its presets, in the interpreter of the benchmark; experts are INT4 as the peers' are."""

    worker = _WORKER

    def __init__(self, preset: str) -> None:
        self.name = preset

    def install(self, home: Path) -> Path:
        return Path(sys.executable)

    def prepare(self, checkpoint: Path, home: Path) -> Path:
        store = home / "stores" / f"{checkpoint.name}-int4"
        convert = [sys.executable, "-m", "fate_moe", "convert", str(checkpoint), str(store), "--precision", "int4"]
        # Dense weights are INT4 too, as the peers'. The fastest solver, since the choice of codes changes neither bytes nor speed.
        convert += ["--dense-precision", "int4", "--solver", "minmax"]
        if not (store / "fate.json").exists():
            subprocess.run(convert, check=True)
        return store

    def variants(self, model: Path, limit_bytes: int | None) -> list[Variant]:
        ram = {} if limit_bytes is None else {"ram": str(limit_bytes - _HEADROOM_BYTES)}
        return [Variant("", {"engine": "fate", "preset": self.name, **ram})]


class Accelerate:
    """transformers with accelerate's disk offload; bf16, because it has no quantized offload on a CPU."""

    name = "transformers + accelerate"
    worker = _WORKER
    _packages = ("torch", "transformers", "accelerate==1.15.0", "safetensors")

    def install(self, home: Path) -> Path:
        return virtual_environment(home / "venvs" / "accelerate", self._packages, _PROJECT / "constraints.txt")

    def prepare(self, checkpoint: Path, home: Path) -> Path:
        return checkpoint

    def variants(self, model: Path, limit_bytes: int | None) -> list[Variant]:
        # With a limit: what Python and torch leave of it (they take about 0.7 GiB). Without one: the free memory.
        free = limit_bytes - (768 << 20) if limit_bytes else int(0.85 * _available_bytes())
        return [Variant("", {"engine": "accelerate", "memory_bytes": free})]


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo").read_text()
    return 1024 * int(next(line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable:")))
