"""llama.cpp, built for this processor (llama-cpp-python) and as a prebuilt AVX2 wheel (xllamacpp); ik_llama.cpp's wheel."""

from __future__ import annotations

import platform
from pathlib import Path

from benchmarks.gguf_export import export
from benchmarks.peers import Variant
from benchmarks.peers.environment import virtual_environment

__all__ = ["LlamaCpp"]

# llama-cpp-python compiles for the processor it runs on. The AMX kernels of 0.3.36 crash (a segmentation fault in
# ggml_backend_amx_mul_mat at the first prompt, Sapphire Rapids), so they are disabled; AVX-512 with VNNI and BF16 stays. The image
# tools are not needed.
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
BUILD = {"CMAKE_ARGS": f"-DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS='{_NO_AMX}' -DCMAKE_CXX_FLAGS='{_NO_AMX}'"}


class LlamaCpp:
    """Q4_0 through mmap, llama.cpp's default; repacking into the processor's layout, also its default, on and off."""

    worker = Path(__file__).with_name("llama_worker.py")

    def __init__(self, name: str, package: str) -> None:
        self.name = name
        self.package = package

    def install(self, home: Path) -> Path:
        build = BUILD if platform.machine() == "x86_64" else {}
        return virtual_environment(home / "venvs" / self.package.split("==")[0], [self.package], build=build)

    def prepare(self, checkpoint: Path, home: Path) -> Path:
        file = home / "gguf" / f"{checkpoint.name}-Q4_0.gguf"
        return file if file.exists() else export(checkpoint, file)

    def variants(self, model: Path, limit_bytes: int | None) -> list[Variant]:
        engine = {"engine": self.package.split("==")[0], "mmap": True}
        return [
            Variant("repacked", {**engine, "repack": True}),
            Variant("not repacked", {**engine, "repack": False}),
        ]
